"""What a run writes about itself: log lines, metrics, timers, traces, pictures."""
