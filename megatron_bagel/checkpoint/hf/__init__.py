"""Hugging Face folders in the released layout, and the table that maps their names to ours."""
