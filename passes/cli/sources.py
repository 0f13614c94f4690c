"""Where the command line gets a model from.

    model.pt                        a TorchScript file
    package.module:callable         a module, or a class or function without arguments that gives one
    torchvision:resnet50            a torchvision model with random weights
    timm:efficientnet_b4            a timm model with random weights
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ir_tools.torch_compat.modules import BatchNorm
from passes.cli.arguments import SOURCES
from passes.cli.example_inputs import SEED
from passes.errors import PassesError


class SourceError(PassesError, ValueError):
    """The text names no model."""


Note = Callable[[str], None]


def load_source(text: str, note: Note = lambda line: None) -> nn.Module | str:
    """The model that `text` names, in eval mode; for a TorchScript file its path, which `optimize` reads itself.

    `note` is called with a line for what was done to the model beyond its author's code (random weights, eval mode).
    Raises `SourceError` when there is no such model.
    """
    if text.endswith((".pt", ".pth", ".ts")) or Path(text).is_file():
        if not Path(text).is_file():
            raise SourceError(f"there is no file {text!r}")
        return text
    kind, colon, name = text.partition(":")
    if not colon or not name or not kind:
        raise SourceError(f"{text!r} is not a model; expected {SOURCES}")
    if kind == "torchvision":
        return _with_random_weights(_torchvision_builder(name), text, note)
    if kind == "timm":
        return _with_random_weights(_timm_builder(name), text, note)
    return _from_callable(kind, name, note)


# -- zoos -------------------------------------------------------------------------------------------------------------


def _import_torchvision() -> ModuleType:
    from ir_tools.torchvision_ops import import_torchvision

    return import_torchvision()


def _torchvision_builder(name: str) -> Callable[[], nn.Module]:
    try:
        models = _import_torchvision().models
    except ModuleNotFoundError as error:
        raise SourceError(_not_installed(error.name or "torchvision")) from error
    names = models.list_models()
    if name not in names:
        raise SourceError(f"torchvision has no model {name!r}{_nearest(name, names)}")
    # Without weights_backbone=None, detection and segmentation models would download a pretrained backbone.
    builder = models.get_model_builder(name)
    options = {k: None for k in ("weights", "weights_backbone") if k in inspect.signature(builder).parameters}
    return lambda: builder(**options)


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    try:
        _import_torchvision()  # timm imports torchvision, which may need its operators declared first
        import timm
    except ModuleNotFoundError as error:
        raise SourceError(_not_installed(error.name or "timm")) from error
    names = timm.list_models()
    if name.partition(".")[0] not in names:
        raise SourceError(f"timm has no model {name!r}{_nearest(name, names)}")
    return lambda: timm.create_model(name, pretrained=False)


def _not_installed(package: str) -> str:
    return f"the package {package!r} is not installed; it comes with `pip install 'torch-passes[zoo]'`"


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _with_random_weights(build: Callable[[], nn.Module], text: str, note: Note) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = build().eval()
        count = randomize_batch_norms(model)
    statistics = f" and random statistics in its {count} batch norms" if count else ""
    note(f"{text} has random weights (seed {SEED}){statistics}")
    return model


def randomize_batch_norms(model: nn.Module) -> int:
    """Give every batch norm random statistics, scale and shift, in place; return how many there are.

    A fresh batch norm has mean 0, variance 1, scale 1 and shift 0: it does nothing, and a wrong fold of it would go
    unseen. The values stay near those, so that most deep networks keep activations of ordinary size.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm)]
    with torch.no_grad():
        for norm in norms:
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 1.5)
            if norm.weight is not None:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.1)
    return len(norms)


# -- the user's own code ----------------------------------------------------------------------------------------------


def _from_callable(module_name: str, attribute: str, note: Note) -> nn.Module:
    text = f"{module_name}:{attribute}"
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise SourceError(f"{text!r} is not a model; expected {SOURCES}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)  # importing may build models too
        target = _find_or_build(module_name, attribute, text)
    if not isinstance(target, nn.Module):
        raise SourceError(f"{text} gives a {type(target).__name__}; expected a torch.nn.Module")
    if target.training:
        target.eval()
        note(f"{text} was in training mode; .eval() was called")
    return target


def _find_or_build(module_name: str, attribute: str, text: str) -> Any:
    target: Any = _import(module_name)
    for part in attribute.split("."):
        if not hasattr(target, part):
            names = [n for n in dir(target) if not n.startswith("_")]
            raise SourceError(f"{module_name} has no {attribute!r}{_nearest(part, names)}")
        target = getattr(target, part)
    return target if isinstance(target, nn.Module) else _build(target, text)


def _import(module_name: str) -> ModuleType:
    if os.getcwd() not in sys.path and "" not in sys.path:
        # An installed command, unlike `python -m`, does not look in the working directory.
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is the user's bug, and keeps its traceback.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise SourceError(
            f"there is no Python module {module_name!r} in the working directory or among the installed packages; "
            f"expected {SOURCES}"
        ) from error


def _build(target: Any, text: str) -> Any:
    if not callable(target):
        kind = type(target).__name__
        raise SourceError(f"{text} is a {kind}; expected a torch.nn.Module, or a callable that gives one")
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        message = f"{text} cannot be called without arguments ({error}); wrap it in a function that can"
        raise SourceError(message) from error
    except ValueError:  # a callable without a signature, such as one written in C
        pass
    torch.manual_seed(SEED)  # whether or not its module was imported just now, which may have drawn random numbers
    return target()
