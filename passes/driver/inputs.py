"""Checks of the arguments of `optimize` before any work is done: each error says what was given and what is expected."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ir_tools.deprecation import warn_renamed
from ir_tools.emit import package
from ir_tools.frontends.capture import FRONTENDS
from ir_tools.ir import Signature
from passes.errors import InputError, ModelInTrainingError, OptionError, SignatureError

VERIFY = ("each", "ends", "off")
EXAMPLES_EXPECTED = "example_inputs must be a tensor, a tuple of arguments or a list of such tuples"

Call: TypeAlias = tuple[tuple, dict[str, Any]]
"""The arguments of a call: those by position, those by keyword."""


def check_options(frontend: str, verify: str, on_failure: str, tolerance: float | None) -> None:
    if frontend not in ("auto", *FRONTENDS):
        raise OptionError(f"frontend must be one of 'auto', {', '.join(map(repr, FRONTENDS))}, got {frontend!r}")
    if verify not in VERIFY:
        raise OptionError(f"verify must be one of {', '.join(map(repr, VERIFY))}, got {verify!r}")
    if on_failure != "raise":
        raise OptionError(f"on_failure must be 'raise' (rolling back is not built yet), got {on_failure!r}")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and abs(tolerance) < math.inf
    if tolerance is not None and not number:
        raise OptionError(f"tolerance is the smallest SQNR allowed, a finite number of dB, got {tolerance!r}")


def under_either_name(name: str, value: Any, old_name: str, old_value: Any) -> Any:
    """The value of an argument that was renamed. Given under its old name, it raises a `DeprecationWarning`."""
    if old_value is None:
        return value
    if value is not None:
        raise OptionError(f"{old_name} is the old name of {name}; give {name} alone")
    warn_renamed(old_name, name)
    return old_value


def refuse_autocast() -> None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise InputError(
                f"torch.autocast is enabled for {device}, and would change dtypes while the model is captured: "
                "call optimize outside of it, and ask for the pass cast_half to compute in a half dtype"
            )


def open_model(model: Any) -> Any:
    if isinstance(model, (str, os.PathLike)):
        return package.read_torchscript(model)[0]
    if isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        return model
    raise InputError(
        f"model must be an nn.Module, ScriptModule, GraphModule, ExportedProgram or the path of a TorchScript file, "
        f"got {type(model).__name__}"
    )


def check_mode(model: Any) -> None:
    if isinstance(model, torch.export.ExportedProgram):
        return
    training = [name or "the model itself" for name, module in model.named_modules() if getattr(module, "training", False)]
    if training:
        more = f" and {len(training) - 5} more" if len(training) > 5 else ""
        raise ModelInTrainingError(
            f"the model is in training mode ({', '.join(training[:5])}{more}); call model.eval() before optimize"
        )


def example_calls(example_inputs: Any, example_kwargs: dict[str, Any] | None) -> list[Call]:
    if example_inputs is None and not example_kwargs:
        raise InputError(
            "example_inputs are missing: sizes and dtypes are taken from them, and the numbers are verified on them. "
            "Give a tensor, a tuple of arguments, or a list of such tuples"
        )
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise InputError("example_inputs is an empty list; give at least one tuple of arguments")
        return [(_arguments(item), kwargs) for item in example_inputs]
    return [(() if example_inputs is None else _arguments(example_inputs), kwargs)]


def _arguments(item: Any, expected: str = EXAMPLES_EXPECTED) -> tuple:
    if isinstance(item, tuple):
        return item
    if isinstance(item, (torch.Tensor, dict)):
        return (item,)
    raise InputError(f"{expected}, got {type(item).__name__}")


def calibration_items(calibration_data: Any, examples: Sequence[Call]) -> list[Call]:
    """The arguments of each call, read once. A tensor, tuple, dict or text would be iterated too, and is no list of calls.

    A dict holds keyword arguments, unless it stands for one that the examples give by position: their first argument is a
    dict then. Those of the examples go with each call; its own take precedence.
    """
    if not isinstance(calibration_data, Iterable) or isinstance(calibration_data, (torch.Tensor, tuple, Mapping, str, bytes)):
        raise InputError(
            "calibration_data must be a list, or another iterable, of calls (tensors, tuples or lists of arguments, dicts of "
            f"keyword arguments), got {type(calibration_data).__name__}"
        )
    by_position = any(arguments and isinstance(arguments[0], Mapping) for arguments, _ in examples)
    kwargs = examples[0][1]
    items: list[Call] = []
    for i, item in enumerate(calibration_data):
        if isinstance(item, Mapping) and not by_position:
            items.append(((), {**kwargs, **{str(name): value for name, value in item.items()}}))
        else:
            expected = f"calibration_data[{i}] must be a tensor, a tuple or list of arguments, or a dict of keyword arguments"
            items.append((tuple(item) if isinstance(item, list) else _arguments(item, expected), kwargs))
    if not items:
        raise InputError("calibration_data is empty; give at least one call, or leave it out to use the example inputs")
    return items


def calibration_tensors(items: Sequence[Call], signature: Signature) -> list[list[torch.Tensor]]:
    """The flat tensors of each call. Raises `InputError` for one that does not fit what the example inputs fixed."""
    calls = []
    for i, (arguments, kwargs) in enumerate(items):
        try:
            tensors = signature.flatten(arguments, kwargs)
            signature.check(tensors)
        except SignatureError as error:
            raise InputError(f"calibration_data[{i}] does not fit the example inputs: {error}") from None
        calls.append([t.detach() for t in tensors])
    return calls


def dump_directory(dump_dir: str | os.PathLike[str] | None) -> Path | None:
    """The directory, created and checked to be writable before any work is done."""
    if dump_dir is None:
        return None
    directory = Path(dump_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OptionError(f"dump_dir {str(directory)!r} cannot be written: {error.strerror or error}") from error
    return directory
