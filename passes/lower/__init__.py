"""Passes that replace the ops of the dialect by those of an engine, the last step before emission."""
