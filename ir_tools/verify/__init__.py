"""Verifying: how far numbers are from those of the user's model, and how large values get."""
