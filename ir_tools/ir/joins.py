"""Joins: what is true of a value that comes out of either branch, of any round of a loop, or of any element of a list."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ir_tools.ir.facts import is_contiguous, same_layout, size, unknown_size
from ir_tools.torch_compat.fake import FakeTensorMode


class _Nothing:
    """The fact of a value that is no tensor yet (a None that a loop starts from), and of whatever is computed from it."""

    def __repr__(self) -> str:
        return "nothing"


NOTHING = _Nothing()


def join(mode: FakeTensorMode, one: Any, other: Any, free: set[Any] | None = None) -> Any:
    """What is true of a tensor that is one or the other: sizes that differ become symbols; None when too little is.

    Where one is not contiguous, neither is the result. Gives `one` itself when that is true of both. The new symbols are put
    into `free`; a size of `one` that is in it already stands for any.
    """
    free = set() if free is None else free
    if one is NOTHING or other is NOTHING:
        return other if one is NOTHING else one
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return None
    if (one.dim(), one.dtype, one.device, one.layout) != (other.dim(), other.dtype, other.device, other.layout):
        return None
    differ = [size(a) not in free and size(a) != size(b) for a, b in zip(one.shape, other.shape, strict=True)]
    if not any(differ):
        return one if same_layout(one, other) or not is_contiguous(one) else _like(mode, one, one.shape, False)
    sizes = [unknown_size(mode, free) if new else a for a, new in zip(one.shape, differ, strict=True)]
    return _like(mode, one, sizes, is_contiguous(one) and is_contiguous(other))


def fresh(mode: FakeTensorMode, known: Any, free: set[Any]) -> Any:
    """`known` with a new symbol for each size that is in `free`."""
    if not isinstance(known, torch.Tensor) or not any(size(s) in free for s in known.shape):
        return known
    sizes = [unknown_size(mode, set()) if size(s) in free else s for s in known.shape]
    return _like(mode, known, sizes, is_contiguous(known))


def _like(mode: FakeTensorMode, known: torch.Tensor, sizes: Sequence[Any], contiguous: bool) -> torch.Tensor:
    with mode:
        if contiguous or known.dim() < 2:
            return torch.empty(list(sizes), dtype=known.dtype, device=known.device)
        axes = list(range(known.dim()))[::-1]
        return torch.empty(list(sizes)[::-1], dtype=known.dtype, device=known.device).permute(axes)


class Elements:
    """The fact of a list or dict: what is true of every tensor in it. Values that are the same container share it.

    `widened` counts how often a container that had been read turned out to hold more kinds of tensors than known then: a loop
    in which that happens is walked again, because what was read had too narrow a fact.
    """

    widened = 0

    def __init__(self, mode: FakeTensorMode, values: Iterable[Any]):
        self.mode = mode
        self.known: Any = NOTHING
        self.was_read = False
        self.free: set[Any] = set()
        for value in values:
            self.add(value)

    def add(self, value: Any) -> None:
        wider = join(self.mode, self.known, value, self.free)
        if wider is not self.known:
            self.known = wider
            Elements.widened += self.was_read

    def read(self) -> Any:
        self.was_read = True
        return self.known

    def __repr__(self) -> str:
        return f"elements {self.known}"
