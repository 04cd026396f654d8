"""Dataclasses that are command-line flags and YAML keys at once, and the validation that names the fix."""
