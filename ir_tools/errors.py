"""The errors of the tools, one tree; and quoting other errors in ours. Needs no torch."""


class PassesError(Exception):
    """Anything that torch-passes raises on purpose."""


class CaptureError(PassesError, RuntimeError):
    """A model that a front end cannot capture; the message says where and why."""


class DynamicShapesError(PassesError, ValueError):
    """`dynamic_shapes` does not fit the inputs, or has a structure that torch.export rejects too."""


class SignatureError(PassesError, TypeError):
    """A call that does not fit the signature that was captured."""


class OptionError(PassesError, ValueError):
    """A pass got an option, or a value of one, that it does not have."""


class EmitError(PassesError, RuntimeError):
    """A Program cannot be written as TorchScript, or the written text was read differently than meant."""


class ModelFileError(PassesError, RuntimeError):
    """A model file that cannot be read or written."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message that says something; the last, where TorchScript puts its traceback above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("failed in the TorchScript interpreter."):
        return lines[-1].removeprefix("builtins.").removeprefix("RuntimeError: ")
    return lines[0] if lines else type(error).__name__
