"""Many prompts from files, and their results on disk."""
