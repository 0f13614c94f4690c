"""The pass `cast_half` and its parts: what half precision does to each op, the constraints that follow, where casts go."""
