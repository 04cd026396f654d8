"""Text and image generation from a context of text and images."""
