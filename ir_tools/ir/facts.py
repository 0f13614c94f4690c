"""Facts: what is known of a value, as fake tensors, and queries about them.

Facts are three-valued: a question about a value without a fact is answered None, "unknown", and a rule that needs the
answer refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ir_tools.ir.host import TENSOR, value_type
from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torch_compat.symbols import GuardOnDataDependentSymNode, ShapeEnv, declare_size, value_for_all
from ir_tools.torch_compat.tensors import likely_memory_format

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def new_mode() -> FakeTensorMode:
    """A mode in which sizes may be symbols: those declared dynamic, and those that depend on data."""
    env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(allow_non_fake_inputs=False, shape_env=env)


def fact(value: Any) -> Any:
    """The fake tensor (or tuple/list of them) of a node, None when unknown; anything else stands for itself."""
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def set_fact(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value


def is_unknown(value: fx.Node) -> bool:
    """A tensor of which nothing is known."""
    return value_type(value) == TENSOR and not isinstance(fact(value), (torch.Tensor, tuple, list))


def shape(value: Any) -> tuple[Any, ...] | None:
    """The sizes of a tensor: ints, and sympy expressions for those that are symbols.

    Expressions are compared structurally: equal ones have equal values whatever the symbols stand for.
    """
    known = fact(value)
    return tuple(map(size, known.shape)) if isinstance(known, torch.Tensor) else None


def size(value: Any) -> Any:
    """An int, or the expression of a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_number else expression


def example_shape(value: Any) -> tuple[int, ...] | None:
    """The sizes of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = fact(value)
    return _of_example(known.shape) if isinstance(known, torch.Tensor) else None


def example_strides(value: Any) -> tuple[int, ...] | None:
    """The strides of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = fact(value)
    return _of_example(known.stride()) if isinstance(known, torch.Tensor) else None


def _of_example(sizes: Iterable[Any]) -> tuple[int, ...] | None:
    numbers: list[Any] = [s if isinstance(s, int) else s.node.hint if s.node.has_hint() else None for s in sizes]
    return None if None in numbers else tuple(numbers)


def rank(value: Any) -> int | None:
    known = fact(value)
    return known.dim() if isinstance(known, torch.Tensor) else None


def dtype(value: Any) -> torch.dtype | None:
    known = fact(value)
    return known.dtype if isinstance(known, torch.Tensor) else None


def device(value: Any) -> torch.device | None:
    known = fact(value)
    return known.device if isinstance(known, torch.Tensor) else None


def is_contiguous(known: torch.Tensor) -> bool:
    try:
        return known.is_contiguous()
    except GuardOnDataDependentSymNode:
        return False


def same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same strides; or both contiguous, and where axes of one element make that ambiguous, for the same memory format."""
    if tuple(map(size, one.stride())) == tuple(map(size, other.stride())):
        return True
    if not is_contiguous(one) or not is_contiguous(other):
        return False
    # Kernels are chosen by the strides of such axes too.
    return has_symbols(one) or has_symbols(other) or likely_memory_format(one) == likely_memory_format(other)


def memory_format(value: Any) -> torch.memory_format | None:
    """The memory format that a tensor is contiguous in, if any."""
    known = fact(value)
    if not isinstance(known, torch.Tensor) or has_symbols(known):
        return None
    ranks = {4: torch.channels_last, 5: torch.channels_last_3d}
    formats = [torch.contiguous_format, *([ranks[known.dim()]] if known.dim() in ranks else [])]
    return next((f for f in formats if known.is_contiguous(memory_format=f)), None)


def has_symbols(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not all(isinstance(s, int) for s in value.shape)


def unknown_number(mode: FakeTensorMode, annotation: str) -> Any:
    """A fresh symbol for a number of that TorchScript type, None for anything else."""
    env = mode.shape_env
    assert env is not None
    if annotation == "int":
        return env.create_unbacked_symint()
    if annotation == "float":
        return env.create_unbacked_symfloat()
    return env.create_unbacked_symbool() if annotation == "bool" else None


def unknown_size(mode: FakeTensorMode, free: set[Any]) -> Any:
    symbol = unknown_number(mode, "int")
    declare_size(symbol)
    free.add(size(symbol))
    return symbol


def holds_always(value: Any) -> bool | None:
    """What a (symbolic) condition is for all values of its symbols; None when it depends on them."""
    if not isinstance(value, torch.SymBool):
        return bool(value) if isinstance(value, (bool, int, float)) else None
    known = value_for_all(value)
    return None if known is None else bool(known)
