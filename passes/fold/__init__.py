"""Passes that fold into weights what scales and shifts them: batch norms, constants, linears in a chain."""
