"""The few doors into `torch.jit` that emission uses.

The public functions (`torch.jit.script`, `save`, `load`) each raise a DeprecationWarning. To silence it, the
process-wide warning filters would have to be changed and changed back, which is not thread safe; what those functions
do behind the warning is called directly instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.jit._recursive import create_script_module, wrap_cpp_module

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
    # "tracing" only skips a check that reads the Python source of `root`'s class.
    return create_script_module(root.eval(), lambda module: [], is_tracing=True)


def define(scripted: ScriptModule, text: str) -> None:
    """Compile `text` as methods of `scripted`. Raises RuntimeError when TorchScript does not accept it."""
    scripted.define(text)  # looks up `torch` and `number` in the globals of this file


def to_bytes(scripted: ScriptModule) -> bytes:
    return scripted._c.save_to_buffer()


@torch.inference_mode(False)  # a tensor made in inference mode could never be written into outside of it
def from_bytes(data: bytes) -> ScriptModule:
    unit = torch._C.CompilationUnit()
    return wrap_cpp_module(torch._C.import_ir_module_from_buffer(unit, data, None, {}, False))  # type: ignore


def to_file(scripted: ScriptModule, path: str, extra_files: Mapping[str, Any]) -> None:
    scripted._c.save(path, _extra_files=dict(extra_files))


@torch.inference_mode(False)
def from_file(path: str) -> ScriptModule:
    unit = torch._C.CompilationUnit()
    return wrap_cpp_module(torch._C.import_ir_module(unit, path, None, {}, False))  # type: ignore
