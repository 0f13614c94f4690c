"""Passes that remove ops which compute nothing new: constants, dropout, neutral ops, views, repeated and dead code."""
