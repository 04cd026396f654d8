"""Replacements that let Megatron-Core run on machines without a GPU."""
