"""What a graph compiler stands on: the IR, its front ends, rewriting, verifying, emitting, drawing.

Nothing in here knows a pass. `passes` imports `ir_tools`, never the other way round.
"""
