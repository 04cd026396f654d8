"""Held-out losses and sample pictures during training."""
