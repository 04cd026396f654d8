"""From planned packs to tensors in the training process."""
