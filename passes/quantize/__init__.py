"""Passes on the way to int8: today the stubs at the borders of what can be quantised."""
