"""Views of an index and of a pack for people."""
