"""Facts: what is known of a value before it is computed, as frozen objects that are equal when they say the same.

    TensorFact    shape, dtype, device, and strides where they are known
    ScalarFact    a number, string or None: its value, or the expression of symbols that it is
    TupleFact     a fact for each part, of a tuple or of a list whose length is known
    ListFact      one fact for every tensor in a list or dict
    ABSENT        no tensor yet: a None that a loop starts from, and whatever is computed from it
    UNKNOWN       nothing is known

Facts are three-valued: a question about a value without a fact is answered None, "unknown", and a rule that needs the
answer refuses. Sizes are ints, and sympy expressions for those that are symbols: expressions are compared structurally, and
equal ones have equal values whatever the symbols stand for. Fake tensors exist inside shape inference alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ir_tools.ir.host import TENSOR, value_type
from ir_tools.torch_compat.symbols import value_for_all
from ir_tools.torch_compat.tensors import likely_memory_format

Sizes = tuple[Any, ...]
"""Ints and sympy expressions."""

_KINDS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
SYMBOLS = tuple(_KINDS)
"""torch's symbolic numbers."""


@dataclass(frozen=True)
class Fact:
    """What is known of a value."""


@dataclass(frozen=True)
class _Bare(Fact):
    name: str

    def __repr__(self) -> str:
        return self.name


UNKNOWN = _Bare("unknown")
ABSENT = _Bare("absent")


@dataclass(frozen=True)
class TensorFact(Fact):
    """A tensor. `strides` is None where they are not known, and for layouts that have none (sparse).

    `example_shape` and `example_strides` are those of the example, in elements: None where a symbol has no example.

    >>> TensorFact.of(torch.zeros(2, 3))
    TensorFact(shape=(2, 3), dtype=torch.float32, device=device(type='cpu'), strides=(3, 1))
    """

    shape: Sizes
    dtype: torch.dtype
    device: torch.device
    strides: Sizes | None
    layout: torch.layout = field(default=torch.strided, repr=False)
    example_shape: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    example_strides: tuple[int, ...] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorFact:
        """The fact of a tensor, real or fake."""
        strided = tensor.layout is torch.strided
        strides = tensor.stride() if strided else None
        examples = (_example(tensor.shape), None if strides is None else _example(strides))
        sizes = None if strides is None else tuple(map(size, strides))
        return cls(tuple(map(size, tensor.shape)), tensor.dtype, tensor.device, sizes, tensor.layout, *examples)

    def lying(self, strides: Sizes | None, example_strides: tuple[int, ...] | None = None) -> TensorFact:
        """The same tensor with other strides; with none, how it lies in memory is not known."""
        return replace(self, strides=strides, example_strides=example_strides)

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def has_symbols(self) -> bool:
        """A size or stride is a symbol: one of a column of what `nonzero` gave has strides that depend on data."""
        return not all(isinstance(s, int) for s in (*self.shape, *(self.strides or ())))


@dataclass(frozen=True)
class ScalarFact(Fact):
    """A value that is no tensor and no container: itself, or a sympy expression. `kind` is its Python type: 1 is not 1.0.

    `symbol` is torch's object for the expression, None for a value that is known.
    """

    kind: type
    value: Any
    symbol: Any = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, value: Any) -> ScalarFact:
        """The fact of a number, torch's symbolic ones included, of a string, a device, None.

        >>> ScalarFact.of(3), ScalarFact.of(3) == ScalarFact.of(3.0)
        (ScalarFact(kind=<class 'int'>, value=3), False)
        """
        if type(value) not in _KINDS:
            return cls(type(value), value)
        kind, symbolic = _KINDS[type(value)], value
        expression = symbolic.node.expr
        is_number = expression in (sympy.true, sympy.false) if kind is bool else expression.is_number
        return cls(kind, kind(expression)) if is_number else cls(kind, expression, value)

    @property
    def is_known(self) -> bool:
        return self.symbol is None


@dataclass(frozen=True)
class TupleFact(Fact):
    parts: tuple[Fact, ...]

    def __len__(self) -> int:
        return len(self.parts)


@dataclass(frozen=True)
class ListFact(Fact):
    """What is true of every tensor in a list or dict."""

    elements: Fact


# -- the fact of a node --------------------------------------------------------------------------------------------------


def fact(value: Any) -> Any:
    """The fact of a node; anything else, a literal argument or a fact, stands for itself."""
    return value.meta.get("fact", UNKNOWN) if isinstance(value, fx.Node) else value


def set_fact(node: fx.Node, value: Fact) -> None:
    node.meta["fact"] = value


def tensor(value: Any) -> TensorFact | None:
    """The fact of a tensor, None for anything else and where it is not known."""
    known = fact(value)
    return known if isinstance(known, TensorFact) else None


def tensors(value: Any) -> list[TensorFact]:
    """The facts of the tensors in a value: its own, or those of its parts."""
    known = fact(value)
    parts = known.parts if isinstance(known, TupleFact) else [known]
    return [part for part in parts if isinstance(part, TensorFact)]


def is_unknown(value: fx.Node) -> bool:
    """A tensor of which nothing is known."""
    return value_type(value) == TENSOR and not isinstance(fact(value), (TensorFact, TupleFact))


def shape(value: Any) -> Sizes | None:
    """The sizes of a tensor."""
    known = tensor(value)
    return None if known is None else known.shape


def strides(value: Any) -> Sizes | None:
    """The strides of a tensor, None where they are not known."""
    known = tensor(value)
    return None if known is None else known.strides


def size(value: Any) -> Any:
    """An int, or the expression of a symbolic one."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_number else expression


def example_shape(value: Any) -> tuple[int, ...] | None:
    """The sizes of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = tensor(value)
    return None if known is None else known.example_shape


def example_strides(value: Any) -> tuple[int, ...] | None:
    """The strides of a tensor, those of the example where they are dynamic; None when one is unknown."""
    known = tensor(value)
    return None if known is None else known.example_strides


def _example(sizes: Sequence[Any]) -> tuple[int, ...] | None:
    numbers: list[Any] = [s if isinstance(s, int) else s.node.hint if s.node.has_hint() else None for s in sizes]
    return None if None in numbers else tuple(numbers)


def rank(value: Any) -> int | None:
    known = tensor(value)
    return None if known is None else known.rank


def dtype(value: Any) -> torch.dtype | None:
    known = tensor(value)
    return None if known is None else known.dtype


def device(value: Any) -> torch.device | None:
    known = tensor(value)
    return None if known is None else known.device


def holds_always(condition: Any) -> bool | None:
    """What a (symbolic) condition is for all values of its symbols; None when it depends on them."""
    if isinstance(condition, ScalarFact):
        condition = condition.value if condition.is_known else condition.symbol
    if not isinstance(condition, torch.SymBool):
        return bool(condition) if isinstance(condition, (bool, int, float)) else None
    known = value_for_all(condition)
    return None if known is None else bool(known)


# -- memory layouts ------------------------------------------------------------------------------------------------------


def is_contiguous(known: TensorFact) -> bool | None:
    """The elements lie in memory in the order of the axes, without gaps; None when the strides are not known."""
    if known.strides is None:
        return None
    if 0 in known.shape:
        return True
    pairs = zip(known.shape, known.strides, contiguous_strides(known.shape), strict=True)
    return all(n == 1 or _at_least(s) == _at_least(dense) for n, s, dense in pairs)


def contiguous_strides(shape: Sizes) -> Sizes:
    """The strides of a contiguous tensor: each the product of the sizes behind it.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides: list[Any] = []
    step: Any = 1
    for n in reversed(shape):
        strides.append(step)
        step = step * (max(n, 1) if isinstance(n, int) else n)
    return tuple(reversed(strides))


def _at_least(stride: Any) -> Any:
    """torch makes strides of `max(size, 1)`, which is the size itself wherever there is an element."""
    if isinstance(stride, int):
        return stride
    return sympy.expand(
        stride.replace(
            lambda e: type(e).__name__ == "Max" and len(e.args) == 2 and 1 in e.args,
            lambda e: next(a for a in e.args if a != 1),
        )
    )


def same_layout(one: TensorFact, other: TensorFact) -> bool | None:
    """The same strides; or both contiguous, and where axes of one element make that ambiguous, for the same memory format.

    None where strides are not known.
    """
    if one.strides is None or other.strides is None:
        return None if one.layout is other.layout is torch.strided else one.layout is other.layout
    if one.strides == other.strides:
        return True
    if not is_contiguous(one) or not is_contiguous(other):
        return False
    # Kernels are chosen by the strides of such axes too.
    return one.has_symbols or other.has_symbols or likely_memory_format(as_meta(one)) == likely_memory_format(as_meta(other))


def memory_format(value: Any) -> torch.memory_format | None:
    """The memory format that a tensor is contiguous in, if any is known."""
    known = tensor(value)
    if known is None or known.has_symbols or known.strides is None:
        return None
    formats = [torch.contiguous_format, *channels_last_of(known.rank)]
    return next((f for f in formats if is_contiguous_in(known, f)), None)


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The memory format that has channels innermost, by rank."""


def channels_last_of(rank: int) -> list[torch.memory_format]:
    return [CHANNELS_LAST[rank]] if rank in CHANNELS_LAST else []


def is_contiguous_in(known: TensorFact, format: torch.memory_format) -> bool | None:
    """Contiguous in the memory format; None when the strides are not known, or depend on symbols."""
    if format is torch.contiguous_format:
        return is_contiguous(known)
    if known.strides is None or known.has_symbols:
        return None
    return as_meta(known).is_contiguous(memory_format=format)


def as_meta(known: TensorFact) -> torch.Tensor:
    """A tensor without memory of known sizes and strides, which answers torch's own questions about layouts."""
    assert known.strides is not None and not known.has_symbols
    return torch.empty_strided(known.shape, known.strides, dtype=known.dtype, device="meta")
