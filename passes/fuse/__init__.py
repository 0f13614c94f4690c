"""Passes that replace several ops by one op of the dialect or of ATen: activations, residuals, attention, softmax."""
