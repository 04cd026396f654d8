"""The optimizer, the moving average of the weights, and the learning rate."""
