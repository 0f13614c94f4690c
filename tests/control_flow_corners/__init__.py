"""Corners of control flow: small scripted models, each with one thing that is easy to get wrong, by subject."""
