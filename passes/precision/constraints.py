"""The precision constraint of each op: which dtypes the placement of casts may compute it in.

    HALF           half                                        matrix ops; at O3 every op of the table
    in_float(why)  float, for a reason                         fragile ops, and ops that half precision would break
    EITHER         half or float                               ops as precise as their operands, with operands half by nature
    WITH_USERS     half only if all its users are              ops that move float values; at O2 all without a half operand
    BETWEEN        half only if all users and operands are     fragile ops whose half kernel computes in float inside
    WITH_OPERANDS  half if and only if its operands are        searches, for which nothing is rounded; constructors
    AS_IT_COMES    none; its operands are not cast             explicit casts, comparisons, ops without float operands

A value is half *by nature* if a half op computed it, or an op that is not fragile did from operands that are half by nature:
from such operands alone at O1, from at least one at O2. At O1 only matrix ops round a value that is float by nature. Under
WITH_USERS and BETWEEN an op in half returns its float result, rounded: for its users only the number of casts differs.

    constraint(op)  =  f(op, hazards, options, nature of its operands)         whatever was asked before
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.dataflow import forward
from ir_tools.ir.dialect import argument, bound_arguments, conv_act, linear_act, short_name
from ir_tools.ir.effects import is_random
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.provenance import record
from ir_tools.rewrite.cast import is_filled, is_read_whole, parts, whole
from ir_tools.rewrite.nearest import locations_of
from ir_tools.verify.ranges import Range
from passes.analysis.value_ranges import NOT_OBSERVED, ValueRanges
from passes.precision.eligibility import reads_float32
from passes.precision.guards import POINTWISE, rounds
from passes.precision.hazards import Hazards, numbers_of
from passes.precision.op_table import (
    CASTS,
    CONSTRUCTORS,
    DECIDES,
    FRAGILE,
    INSIDE,
    MATRIX,
    MOVES,
    NAMED,
    NO_KERNEL,
    PERIODIC,
    STAYS_FLOAT,
)
from passes.precision.reasons import (
    DECIDED,
    FOLLOWS_FLOAT,
    IS_A_CAST,
    IS_A_PHASE,
    IS_FRAGILE,
    IS_KEPT,
    IS_RANDOM,
    IS_READ_WHOLE,
    IS_SKIPPED,
    KEEPS_FLOAT,
    LACKS_A_KERNEL,
    MADE_IN_FLOAT,
    NOT_RUN,
)

WHY_FLOAT = {
    **dict.fromkeys(PERIODIC, IS_A_PHASE),
    **dict.fromkeys(CASTS, IS_A_CAST),
    **{name: why for why, names in STAYS_FLOAT.items() for name in names},
}

KNOWN = POINTWISE | FRAGILE


@dataclass(frozen=True)
class PrecisionConstraint:
    """`side`: a row of the table above. `reason`: why an op stays in float."""

    side: str
    reason: str = ""


HALF, EITHER, WITH_USERS, BETWEEN = map(PrecisionConstraint, ("half", "either", "with users", "between"))
WITH_OPERANDS, AS_IT_COMES = map(PrecisionConstraint, ("with operands", "as it comes"))


def in_float(reason: str) -> PrecisionConstraint:
    return PrecisionConstraint("float", reason)


@dataclass(frozen=True)
class PrecisionOptions:
    """What the user asks for. `overrides`: levels of modules and ops, or "float". `skip`: ids of sites to leave alone."""

    half: torch.dtype
    level: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    skip: Set[str] = frozenset()

    def level_of(self, node: Any) -> str:
        """The level that the options give to an op: a module before a kind of op, and the longest path, decides."""
        names = self.overrides.keys() & {short_name(node.target), *locations_of(node)} if self.overrides else ()
        return self.overrides[max(names, key=lambda name: (name not in NAMED, len(name)))] if names else self.level


@dataclass(frozen=True, eq=False)
class Policy:
    """The precision constraint of each op of a Block, and which values are half by nature."""

    hazards: Hazards
    options: PrecisionOptions
    natural: Mapping[Any, bool]
    constraints: Mapping[Any, PrecisionConstraint]

    @classmethod
    def of(cls, block: Block, options: PrecisionOptions, observed: Mapping[str, Range] = NOT_OBSERVED) -> Policy:
        hazards = Hazards.of(ValueRanges.of(block, observed), options.half)
        natural = forward(block, lambda node, known: is_half_by_nature(node, hazards, options, known))
        constraints = {node: constraint_of(node, hazards, options, natural) for node in block.calls}
        return cls(hazards, options, natural, MappingProxyType(constraints))

    @property
    def block(self) -> Block:
        return self.hazards.block


Nature = Mapping[Any, bool]
"""Which values are half by nature: of the operands of an op at least."""


def constraint_of(node: Any, hazards: Hazards, options: PrecisionOptions, natural: Nature) -> PrecisionConstraint:
    """The precision constraint of one op; parts of several results have that of the whole."""
    node = whole(node) or node
    why = why_not(node, hazards, options)
    if why is not None:
        return AS_IT_COMES if why == "" else in_float(why)
    constraint = by_table(node, hazards, options, natural)
    return in_float(NOT_RUN) if constraint is HALF and not hazards.reading.values.was_run else constraint


def is_half_by_nature(node: Any, hazards: Hazards, options: PrecisionOptions, natural: Nature) -> bool:
    if node.op != "call_function":
        return False
    if (container := whole(node)) is not None:
        return natural[container]
    constraint = constraint_of(node, hazards, options, natural)
    if constraint is HALF:
        return not adds_a_float(node, hazards, options, natural)
    return constraint in (EITHER, WITH_OPERANDS) and follows_half(node, hazards, options, natural)


def follows_half(node: Any, hazards: Hazards, options: PrecisionOptions, natural: Nature) -> bool:
    """Its operands make an op half by nature: all of them at O1, one at O2."""
    halves = [natural[n] for n in hazards.floats(node)]
    if options.level_of(node) != "O1":
        return any(halves) or not halves
    return bool(halves) and all(halves) and not any(is_rounded(n, hazards) for n in node.all_input_nodes)


def adds_a_float(node: Any, hazards: Hazards, options: PrecisionOptions, natural: Nature) -> bool:
    """At O1, a matrix op with a fused residual that is float by nature; their sum is float by nature, too (`residuals`)."""
    fused = node.target in (conv_act, linear_act) and options.level_of(node) == "O1"
    residual = argument(node, "residual") if fused else None
    return residual is not None and is_float_by_nature(residual, hazards, natural)


def is_float_by_nature(value: Any, hazards: Hazards, natural: Nature) -> bool:
    """Half precision would round a float32 value that no half op has rounded yet."""
    if hazards.is_free(value):
        return is_rounded(value, hazards)
    return dtype_of(value) is torch.float32 and not natural[value]


def is_rounded(value: Any, hazards: Hazards) -> bool:
    """A constant that half precision cannot represent exactly."""
    constant = hazards.block.constant(value)
    if constant is None or constant.dtype is not torch.float32 or constant.dim() == 0:
        return False
    return not torch.equal(constant.to(hazards.half).float(), constant)


def why_not(node: Any, hazards: Hazards, options: PrecisionOptions) -> str | None:
    """Why an op stays in float whatever its entry in the table; "" where there is nothing to compute in half."""
    if (why := hazards[node].ineligible) is not None:
        return why
    if record(node).keep_float:
        return KEEPS_FLOAT
    if options.level_of(node) == "float":
        return IS_KEPT
    if site_of(node) in options.skip:
        return IS_SKIPPED
    if is_read_whole(node):
        return IS_READ_WHOLE
    if why := hazards[node].written:
        return why
    if is_filled(node):
        return ""
    return hazards[node].read if reads_float32(node) else MADE_IN_FLOAT


def by_table(node: Any, hazards: Hazards, options: PrecisionOptions, natural: Nature) -> PrecisionConstraint:
    """The constraint by the op's entry in the table, the level, and the nature of its operands."""
    name, level = short_name(node.target), options.level_of(node)
    halves = [natural[n] for n in hazards.floats(node)]
    if name in NO_KERNEL[hazards.half]:
        return in_float(LACKS_A_KERNEL)
    if name in MATRIX:
        return HALF
    if name in DECIDES:
        numbers = numbers_of(node, hazards.reading.values)
        if not all(halves) or any(rounds(number, hazards.half) for number in numbers):
            return in_float(DECIDED)
        return WITH_OPERANDS if dtype_of(node) is torch.float32 or parts(node) else AS_IT_COMES
    if name in CONSTRUCTORS:
        return WITH_OPERANDS
    given = bound_arguments(node)
    if given.get("rounding_mode") is not None:
        return in_float(IS_A_PHASE)
    if is_random(node):
        return in_float(IS_RANDOM)
    if given.get("reduce") is not None and name == "scatter":
        return in_float(IS_FRAGILE)
    if why := WHY_FLOAT.get(name):
        return in_float(why)
    if name not in KNOWN:
        return in_float(f"cast_half has no entry for {name}")
    if level == "O3":
        return HALF
    if name in FRAGILE or (name in INSIDE and not (halves and all(halves))):
        return in_float(IS_FRAGILE)
    if name in INSIDE:
        return BETWEEN
    if follows_half(node, hazards, options, natural):
        return EITHER
    return WITH_USERS if name in MOVES or level == "O2" else in_float(FOLLOWS_FLOAT)


def site_of(node: Any) -> str:
    return f"cast_half@{node.name}"
