"""Errors of emission and of model files."""

from ir_tools.errors import PassesError


class EmitError(PassesError, RuntimeError):
    """A Program cannot be written as TorchScript, or the written text was read differently than meant."""


class ModelFileError(PassesError, RuntimeError):
    """A model file that cannot be read or written."""


def interpreter_message(error: Exception) -> str:
    """What was raised inside TorchScript, without the interpreter's traceback above it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip().removeprefix("builtins.").removeprefix("RuntimeError: ")
