"""Tracing to operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import fx
from torch.fx.experimental import proxy_tensor


def trace_to_aten(function: Callable[..., Any], tracing_mode: Literal["fake", "symbolic"]) -> Callable[..., fx.GraphModule]:
    """A function that takes example inputs and gives the graph of ATen operators, before autograd takes them apart.

    Real tensors that the function holds may meet the fake ones.
    """
    return proxy_tensor.make_fx(
        function, tracing_mode=tracing_mode, pre_dispatch=True, _allow_non_fake_inputs=True, record_module_stack=True
    )
