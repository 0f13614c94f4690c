"""Joins: what is true of a value that comes out of either branch, of any round of a loop, or of any element of a list."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ir_tools.ir.facts import (
    ABSENT,
    UNKNOWN,
    Fact,
    ListFact,
    TensorFact,
    TupleFact,
    contiguous_strides,
    fact,
    is_contiguous,
    same_layout,
    set_fact,
)
from ir_tools.ir.inference_mode import InferenceMode


def join(mode: InferenceMode, one: Fact, other: Fact, free: set[Any] | None = None) -> Fact:
    """What is true of a tensor that is one or the other: sizes that differ become symbols; UNKNOWN when too little is.

    Strides are known where both lie in memory alike. Gives `one` when that is true of both. The new symbols are put into
    `free`; a size of `one` that is in it already stands for any.
    """
    free = set() if free is None else free
    if one is ABSENT or other is ABSENT:
        return other if one is ABSENT else one
    if not isinstance(one, TensorFact) or not isinstance(other, TensorFact):
        return UNKNOWN
    if (one.rank, one.dtype, one.device, one.layout) != (other.rank, other.dtype, other.device, other.layout):
        return UNKNOWN
    differ = [a not in free and a != b for a, b in zip(one.shape, other.shape, strict=True)]
    if not any(differ):
        return one if one.strides is None or same_layout(one, other) else one.lying(None)
    shape = tuple(mode.unknown_size(free) if new else a for a, new in zip(one.shape, differ, strict=True))
    dense = is_contiguous(one) and is_contiguous(other)
    return TensorFact(shape, one.dtype, one.device, contiguous_strides(shape) if dense else None, one.layout)


def fresh(mode: InferenceMode, known: Fact, free: set[Any]) -> Fact:
    """`known` with a new symbol for each size that is in `free`."""
    if not isinstance(known, TensorFact) or not any(n in free for n in known.shape):
        return known
    shape = tuple(mode.unknown_size(set()) if n in free else n for n in known.shape)
    strides = contiguous_strides(shape) if is_contiguous(known) else None
    return TensorFact(shape, known.dtype, known.device, strides, known.layout)


class Elements(Fact):
    """What is known so far of a list or dict while a model is captured: of every tensor in it. It grows with what is put in.

    Values that are the same container share it. `settle` makes a `ListFact` of it when the model is captured. `widened` counts
    how often a container that had been read turned out to hold more kinds of tensors than known then: a loop in which that
    happens is walked again, because what was read had too narrow a fact.
    """

    widened = 0

    def __init__(self, mode: InferenceMode, values: Iterable[Fact]):
        self.mode = mode
        self.known: Fact = ABSENT
        self.was_read = False
        self.free: set[Any] = set()
        for value in values:
            self.add(value)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def add(self, value: Fact) -> None:
        wider = join(self.mode, self.known, value, self.free)
        if wider != self.known:
            self.known = wider
            Elements.widened += self.was_read

    def read(self) -> Fact:
        self.was_read = True
        return self.known

    def __repr__(self) -> str:
        return f"elements {self.known}"


def settle(nodes: Iterable[fx.Node]) -> None:
    """Fix the facts of the containers in a graph.

    How their tensors lie in memory is left open: a pass may change that, and nothing says which containers are the same one.
    """

    def settled(known: Fact) -> Fact:
        if isinstance(known, TupleFact):
            return TupleFact(tuple(map(settled, known.parts)))
        if not isinstance(known, Elements):
            return known
        inside = known.known
        return ListFact(inside.lying(None) if isinstance(inside, TensorFact) else inside)

    for node in nodes:
        if isinstance(fact(node), (Elements, TupleFact)):
            set_fact(node, settled(fact(node)))
