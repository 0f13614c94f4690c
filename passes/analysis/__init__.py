"""What is known of a graph's values, whatever is decided from it: their numbers, and what they are read as."""
