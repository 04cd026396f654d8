"""From settings to a run that is ready to step."""
