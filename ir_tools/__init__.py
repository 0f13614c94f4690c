"""What a graph compiler needs beside its passes: the IR, its front ends, rewriting, verifying, emitting, drawing."""
