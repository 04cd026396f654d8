"""The engine: contexts with caches, guidance, text and pictures."""
