"""From a folder or a checkpoint to modules with weights, for training and for inference."""
