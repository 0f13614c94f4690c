"""The pass `cast_half` and its parts: an op table, precision constraints per op, casts placed by a minimum cut."""
