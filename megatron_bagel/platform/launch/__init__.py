"""Processes and process groups: how ranks start, find each other and end."""
