"""Optimizer, averages and learning rate."""
