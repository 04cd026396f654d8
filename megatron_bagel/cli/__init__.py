"""The console commands: they parse, resolve a run once, and hand settings to the rooms below."""
