"""The training step and everything around it: losses, optimizer, EMA, schedule, metrics."""
