"""Passes that find, written in many ops, what one op of the dialect or of ATen computes: activations, attention, softmax."""
