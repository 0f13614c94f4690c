"""Emission: Programs as TorchScript modules, and the files that hold them."""
