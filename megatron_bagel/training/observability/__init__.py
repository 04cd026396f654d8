"""Log lines, metrics, timers, traces and pictures of a run."""
