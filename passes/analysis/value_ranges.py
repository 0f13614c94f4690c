"""Which numbers each value of a Block may hold: what the model writes, what its constants hold, what was observed on data.

    literals     the numbers that an op is written with: x + 1e-12
    constant     the range of a constant
    observed     the range of a value over the calls, and the rounds of a loop, on which it was observed

Nothing is decided here: what a number means for a dtype is for those to say who know the dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.dialect import numbers_in
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.verify.ranges import Range, is_counted, range_of

NOT_OBSERVED: Mapping[str, Range] = MappingProxyType({})


@dataclass(frozen=True)
class ValueRange:
    """What is known of the numbers of one value; None where nothing is. `number`: of a float32 constant that is one number."""

    literals: tuple[float, ...] = ()
    constant: Range | None = None
    number: float | None = None
    observed: Range | None = None


@dataclass(frozen=True, eq=False)
class ValueRanges:
    """The `ValueRange` of each value of a Block.

    `is_observed`: ranges were observed at all. `was_run`: nothing speaks against the Block's having run there; a branch that
    was never taken, and the body of a loop without rounds, was not.
    """

    block: Block
    by_value: Mapping[Any, ValueRange]
    is_observed: bool
    was_run: bool

    @classmethod
    def of(cls, block: Block, observed: Mapping[str, Range] = NOT_OBSERVED) -> ValueRanges:
        """Of the values of `block`, with the ranges that were observed by the name of the node (of all Blocks of a Program)."""
        by_value = {node: _known(block, node, observed.get(node.name)) for node in block.nodes}
        was_run = not observed or any(known.observed is not None for known in by_value.values())
        return cls(block, MappingProxyType(by_value), bool(observed), was_run)

    def __getitem__(self, value: Any) -> ValueRange:
        return self.by_value[value]


def _known(block: Block, node: Any, observed: Range | None) -> ValueRange:
    constant = block.constant(node)
    if constant is None:
        return ValueRange(tuple(numbers_in(node)) if node.op == "call_function" else (), observed=observed)
    if not is_counted(constant):
        return ValueRange()
    is_number = constant.numel() == 1 and dtype_of(node) is torch.float32
    known = range_of(constant) if observed is None else observed
    return ValueRange((), known, float(constant) if is_number else None, observed)
