"""Detects what goes wrong in a run, reports it, and continues or ends the run."""
