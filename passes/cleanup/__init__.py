"""Passes that leave out what computes nothing new: constants, dropout, neutral ops, views, repeated and dead code."""
