"""The memory-mapped index: how it is built, checked and read."""
