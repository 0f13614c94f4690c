"""Values that were observed, on example data, not to fit into half precision.

    unfit(v)        =   v is near the end of the range, or lost below it, or a difference that cancels
                        or the source of a value that does not fit: some user moves v, and unfit(user)
    difference(v)   =   v is divided by, and as small as the rounding errors of its terms;  or moves a difference

Ranges come by the name of the value, those of a loop over all its rounds.
"""

from collections.abc import Mapping, Set
from operator import or_
from types import MappingProxyType
from typing import Any

import torch

from ir_tools.ir.dataflow import backward, forward
from ir_tools.ir.dialect import bound_arguments, short_name
from ir_tools.ir.facts import dtype as dtype_of
from passes.analysis.value_ranges import ValueRanges
from passes.precision.op_table import MOVES
from passes.precision.reasons import CANCELS, LOSES, OVERFLOWS, SOURCE_UNFIT
from passes.precision.representable import is_lost, is_near_the_end

SUMS = frozenset("add sub rsub".split())


def cancelling_values(values: ValueRanges, half: torch.dtype, divisors: Set[Any]) -> frozenset[Any]:
    """Small differences that a division or logarithm reads, the values they are the differences of, and those they move to."""
    small = frozenset(node for node in divisors if cancels(values, node, half))

    def is_difference(node: Any, known: Mapping[Any, bool]) -> bool:
        moves = node.op == "call_function" and short_name(node.target) in MOVES
        return node in small or (moves and any(known[n] for n in node.all_input_nodes))

    differences = forward(values.block, is_difference)
    return frozenset(n for n, holds in differences.items() if holds).union(*(node.all_input_nodes for node in small))


def cancels(values: ValueRanges, node: Any, half: torch.dtype) -> bool:
    """A sum observed to be as small as the rounding errors of its terms."""
    seen = values[node].observed
    if seen is None or short_name(node.target) not in SUMS:
        return False
    terms = [known.largest for n in node.all_input_nodes if (known := values[n].observed) is not None]
    literals = [abs(n) for name, n in bound_arguments(node).items() if name != "alpha" and isinstance(n, (int, float))]
    return seen.smallest < torch.finfo(half).eps * max([*terms, *literals], default=0.0)


def unfit_values(values: ValueRanges, half: torch.dtype, divisors: Set[Any], cancelling: Set[Any]) -> Mapping[Any, str]:
    """The values that do not fit, and why."""

    def why(value: Any) -> str | None:
        seen = values[value].observed if dtype_of(value) is torch.float32 and value.op != "get_attr" else None
        if seen is None:
            return None
        if value in cancelling:
            return CANCELS
        if is_near_the_end(seen, half):
            return OVERFLOWS
        return LOSES if is_lost(seen, half, is_divisor=value in divisors) else None

    def moves_unfit(user: Any, value: Any, is_source: bool) -> bool:
        return (is_source or user in found) and short_name(user.target) in MOVES

    found = {value: reason for value in values.block.nodes if (reason := why(value)) is not None}
    sources = backward(values.block, moves_unfit, or_, False)
    return MappingProxyType({value: SOURCE_UNFIT for value, holds in sources.items() if holds} | found)
