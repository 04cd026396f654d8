"""Training state on disk, and the weight map to and from Hugging Face folders."""
