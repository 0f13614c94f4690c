"""From TorchScript to a `Program`: a walk over the graph that computes what is known and captures the rest."""
