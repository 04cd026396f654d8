"""The page on which people draw, edit and ask."""
