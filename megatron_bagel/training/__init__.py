"""The training loop and its steps, with losses, optimizer, moving average, schedule, evaluation and metrics."""
