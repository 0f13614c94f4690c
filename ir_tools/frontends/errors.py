"""Errors of the front ends."""

from ir_tools.errors import PassesError


class CaptureError(PassesError, RuntimeError):
    """A model that a front end cannot capture; the message says where and why."""
