"""The front ends: a model and example calls become a `Program`, through torch.export, FX, TorchScript or a trace."""
