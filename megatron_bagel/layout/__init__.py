"""Integers only: what a pack looks like, who attends to whom, which rank holds which token."""
