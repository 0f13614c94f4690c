"""What emission asks of TorchScript: modules without methods, methods from text, files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule

from ir_tools.torch_compat.jit import (
    module_from_bytes,
    module_from_file,
    module_to_bytes,
    module_to_file,
    script_without_methods,
)

# TorchScript looks this name up where text is defined. It knows `List`, `Tensor` ... by itself, but has no name for the
# type of a `Scalar` argument.
number = int | float | complex


class Box(nn.Module):
    """A module that only holds constants. Boxes of one structure share one TorchScript type."""


Box.__module__ = "torch_passes"  # names of types in the file come from here; they should not name our folders


def new_box(name: str) -> nn.Module:
    """A Box of a class of its own, so that methods defined on it are not shared with boxes of the same structure."""
    return type(name, (Box,), {"__module__": "torch_passes"})()


def script_tree(root: nn.Module) -> ScriptModule:
    """A ScriptModule of the tree under `root`, without methods; parameters and buffers are the same tensors."""
    return script_without_methods(root.eval())


def define(scripted: ScriptModule, text: str) -> None:
    """Compile `text` as methods of `scripted`. Raises RuntimeError when TorchScript does not accept it."""
    scripted.define(text)  # looks up `torch` and `number` in the globals of this file


def to_bytes(scripted: ScriptModule) -> bytes:
    return module_to_bytes(scripted)


@torch.inference_mode(False)  # a tensor made in inference mode could never be written into outside of it
def from_bytes(data: bytes) -> ScriptModule:
    return module_from_bytes(data)


def to_file(scripted: ScriptModule, path: str, extra_files: Mapping[str, Any]) -> None:
    module_to_file(scripted, path, extra_files)


@torch.inference_mode(False)
def from_file(path: str) -> ScriptModule:
    return module_from_file(path)
