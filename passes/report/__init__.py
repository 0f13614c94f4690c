"""What `optimize` did, as data, and as text."""
