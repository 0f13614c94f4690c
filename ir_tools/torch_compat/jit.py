"""TorchScript behind its warnings. For front ends, emission and benchmarks only, as `torch.jit` itself.

The public functions (`torch.jit.script`, `save`, `load`) each raise a DeprecationWarning. To silence it, the
process-wide warning filters would have to be changed and changed back, which is not thread safe; what those functions
do behind the warning is called directly instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule, _recursive


def script_without_methods(root: nn.Module) -> ScriptModule:
    """A ScriptModule of the tree under `root`, without methods; parameters and buffers are the same tensors."""
    # "tracing" only skips a check that reads the Python source of `root`'s class.
    return _recursive.create_script_module(root, lambda module: [], is_tracing=True)


def module_to_bytes(scripted: ScriptModule) -> bytes:
    """The module as the contents of a file."""
    return scripted._c.save_to_buffer()


def module_from_bytes(data: bytes) -> ScriptModule:
    """The module of the contents of a file."""
    unit = torch._C.CompilationUnit()
    return _recursive.wrap_cpp_module(torch._C.import_ir_module_from_buffer(unit, data, None, {}, False))  # type: ignore


def module_to_file(scripted: ScriptModule, path: str, extra_files: Mapping[str, Any]) -> None:
    """Write the module to a file, with `extra_files` by name beside it."""
    scripted._c.save(path, _extra_files=dict(extra_files))


def module_from_file(path: str) -> ScriptModule:
    """The module in a file."""
    unit = torch._C.CompilationUnit()
    return _recursive.wrap_cpp_module(torch._C.import_ir_module(unit, path, None, {}, False))  # type: ignore


def forward_schema(scripted: ScriptModule) -> torch.FunctionSchema:
    """The schema of a module's `forward`; its first argument is the module."""
    return scripted._c._get_method("forward").schema


def wraps_script_object(value: Any) -> bool:
    """The value is a Python object around one of TorchScript, such as a submodule."""
    return hasattr(value, "_c")


SLOTS = frozenset({"_c", "_concrete_type", "_initializing", "_actual_script_module"})
"""The attributes in which a ScriptModule keeps its own affairs."""


@contextmanager
def own_class_table() -> Iterator[None]:
    """A context in which what is scripted neither comes from torch's table of compiled classes nor gets into it."""
    compiled = _recursive.concrete_type_store
    _recursive.concrete_type_store = _recursive.ConcreteTypeStore()
    try:
        yield
    finally:
        _recursive.concrete_type_store = compiled


def watch_compiled_methods(see: Callable[[str], None]) -> None:
    """From now on, `see` is called with every text of methods that this process has TorchScript compile."""
    define = torch._C.ScriptModule._define  # type: ignore[attr-defined]

    def watched(module: Any, concrete_type: Any, text: str, *rest: Any) -> Any:
        see(text)
        return define(module, concrete_type, text, *rest)

    torch._C.ScriptModule._define = watched  # type: ignore[attr-defined]
