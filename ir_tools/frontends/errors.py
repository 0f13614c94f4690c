"""Errors of the front ends."""

from ir_tools.errors import PassesError


class CaptureError(PassesError, RuntimeError):
    """A model that a front end cannot capture; the message says where and why."""


class DynamicShapesError(PassesError, ValueError):
    """`dynamic_shapes` does not fit the inputs, or is written in a way that torch.export would not take either."""
