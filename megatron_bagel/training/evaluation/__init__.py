"""Held-out losses and sample pictures while training goes on."""
