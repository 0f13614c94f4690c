"""The handlers of the walk, by subject: each says what nodes of one kind become."""
