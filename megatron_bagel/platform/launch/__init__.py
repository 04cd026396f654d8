"""Processes and process groups: how ranks start, meet, and end."""
