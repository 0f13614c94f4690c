"""What a graph compiler stands on, whatever its passes: the IR, its front ends, rewriting, verifying, emitting, drawing."""
