"""Errors of emission and of model files."""

from ir_tools.errors import PassesError


class EmitError(PassesError, RuntimeError):
    """A Program cannot be written as TorchScript, or the written text was read differently than meant."""


class ModelFileError(PassesError, RuntimeError):
    """A model file that cannot be read or written."""
