"""Dispatch: modes that see every operator, tensors that only wrap another, and running outside of all of that."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch._dispatch import python
from torch.utils import _mode_utils, _python_dispatch

TorchDispatchMode = _python_dispatch.TorchDispatchMode
"""A context in which every operator goes through `__torch_dispatch__`."""

python_kernels = python.enable_python_dispatcher
"""A context in which operators that have a twin in Python run that one, which knows symbolic sizes."""

without_modes = _mode_utils.no_dispatch
"""A context in which operators run as if no mode were active."""

no_torch_function = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a tensor class that does not see functions, only operators."""

Wrapper = TypeVar("Wrapper", bound=torch.Tensor)


def wrapper_tensor(kind: type[Wrapper], like: torch.Tensor, device: Any) -> Wrapper:
    """A tensor of the class `kind` without memory, with sizes, strides, dtype and layout of `like`, that claims `device`."""
    return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
        kind,
        like.size(),
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        layout=like.layout,
        device=device,
        requires_grad=False,
    )


FILES_AROUND_MODES = (
    *("torch/overrides.py", "torch/utils/_python_dispatch.py", "torch/_ops.py"),
    *("torch/_compile.py", "torch/_dynamo/eval_frame.py"),
)
"""The files of torch whose frames stand between an operator and the handler of a mode."""

FILES_OF_TRACERS = (
    *("torch/jit/", "torch/export/", "torch/_export/", "torch/fx/_symbolic_trace.py", "torch/fx/experimental/proxy_tensor.py"),
)
"""The files and folders of torch's own tracer, script compiler, exporter and symbolic tracers."""
