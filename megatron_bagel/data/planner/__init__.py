"""Which samples make which pack, and which replica gets it."""
