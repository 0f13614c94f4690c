"""The errors and the warning that users meet. Each message says what was given, what was expected, and what to do."""

from ir_tools.emit.errors import EmitError, ModelFileError
from ir_tools.errors import PassesError
from ir_tools.frontends.errors import CaptureError, DynamicShapesError
from ir_tools.ir.signature import SignatureError
from ir_tools.rewrite import OptionError

__all__ = [
    "CaptureError",
    "DynamicShapesError",
    "EmitError",
    "InputError",
    "ModelFileError",
    "ModelInTrainingError",
    "NumericsError",
    "OptionError",
    "PassOrderError",
    "PassesError",
    "SignatureError",
    "SlowerWarning",
    "UnknownPassError",
]


class UnknownPassError(PassesError, ValueError):
    """A name that is no pass; the nearest names are listed."""


class PassOrderError(PassesError, ValueError):
    """The passes are in an order that would give wrong or worse results."""


class InputError(PassesError, ValueError):
    """The example inputs are missing or do not fit the model."""


class ModelInTrainingError(PassesError, ValueError):
    """The model, or a module in it, is in training mode."""


class NumericsError(PassesError, ArithmeticError):
    """The numbers moved further than the pass may move them."""


class SlowerWarning(UserWarning):
    """A pass made the model slower on this machine."""
