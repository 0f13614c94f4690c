"""Passes that prepare int8: for now the stubs at the borders of quantisable subgraphs."""
