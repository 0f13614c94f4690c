"""From a call of `optimize` to a compiled model: the inputs, the compilation, the pipeline and what is run around its steps."""
