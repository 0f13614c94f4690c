"""Numbers, no assertions."""
