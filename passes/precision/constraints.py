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
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.alias_analysis import derived, is_handed_out
from ir_tools.ir.dialect import argument, bound_arguments, conv_act, linear_act, nodes_in, short_name
from ir_tools.ir.effects import is_random
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.facts import is_unknown
from ir_tools.ir.provenance import record
from ir_tools.ir.regions import is_region
from ir_tools.ir.view import upstream
from ir_tools.rewrite import RewriteLog
from ir_tools.rewrite.cast import is_filled, is_read_whole, parts, whole
from ir_tools.rewrite.nearest import locations_of
from passes.precision.hazards import MOVES_OR_FOLLOWS, READS_TINY, READS_WIDE, Numbers, rounds
from passes.precision.op_table import (
    CASTS,
    CONSTRUCTORS,
    DECIDES,
    FOLLOWS,
    FRAGILE,
    INSIDE,
    MATRIX,
    MOVES,
    NAMED,
    NO_FLOATS,
    NO_KERNEL,
    PERIODIC,
    STAYS_FLOAT,
)

FOLLOWS_FLOAT = "an operand is float, and at O1 the op follows its operands"
IS_FRAGILE = "norms, softmax, exponentials and long sums lose too many digits in half precision"
IS_A_CAST = "it casts to the dtype of another value"
IS_A_PHASE = "a sine, cosine or rounding is computed from it, for which half precision has too few digits after the point"
IS_GUARDED = "a later bound or difference needs more digits than half precision has"
DECIDED = "it compares float values, or values with a number that half precision would round"
LACKS_A_KERNEL = "torch has no kernel for it in half precision on the CPU"
KEEPS_FLOAT = "the model switches autocast off around it"
IS_KEPT = "the options keep it in float"
IS_WRITTEN = "its operands or result are written in place"
HAS_FLOAT64 = "an operand or the result is float64"
HAS_OTHERS = "an operand or the result is complex, or of another half dtype"
IS_UNKNOWN = "unknown: the dtype of a value that comes out of a list or dict"
MADE_IN_FLOAT = "its result is float, and none of its operands is"
IS_CONTROL_FLOW = "operands and results of branches and loops stay float"
IS_SKIPPED = "this site is skipped"
READS_INTEGERS = "it computes with integers that half precision may not represent"
IS_RANDOM = "in another dtype it draws other random numbers"
IS_READ_WHOLE = "its results are used as one list"

WHY_FLOAT = {
    **dict.fromkeys(PERIODIC, IS_A_PHASE),
    **dict.fromkeys(CASTS, IS_A_CAST),
    **{name: why for why, names in STAYS_FLOAT.items() for name in names},
}

EXPECTED = frozenset(
    (FOLLOWS_FLOAT, IS_FRAGILE, IS_A_CAST, READS_WIDE, READS_TINY, IS_A_PHASE, IS_GUARDED, DECIDED, KEEPS_FLOAT, MADE_IN_FLOAT,
     IS_CONTROL_FLOW, IS_SKIPPED)
)  # fmt: skip
"""Reasons that hold for whole kinds of ops by design: `explain` lists them, the printed report does not."""

POINTWISE = MOVES | FOLLOWS | INSIDE
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


@dataclass
class Policy:
    """The precision constraints of a Block at a level, with the overrides of the options.

    `constraints`: one for each op. `natural`: values that are half by nature. `rounded`: whether half precision rounds a
    constant. `adds_a_float`: fused ops whose residual O1 adds in float (`residuals`).
    """

    block: Block
    half: torch.dtype
    level: str
    overrides: Mapping[str, str]
    log: RewriteLog
    constraints: dict[Any, PrecisionConstraint] = field(default_factory=dict)
    natural: set[Any] = field(default_factory=set)
    rounded: dict[Any, bool] = field(default_factory=dict)
    adds_a_float: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.numbers = Numbers(self.block, self.half, self.log)
        self.guarded = upstream(self.block, self.numbers.guards.__contains__, is_pointwise)
        self.mutated = self.block.mutated_values
        self.original = {node: dtype_of(node) for node in self.block.nodes}
        self.phases = upstream(self.block, is_periodic, passes_a_phase_on(self.block))
        for node in self.block.calls:
            container = whole(node)
            self.constraints[node] = constraint = self._constraint(node) if container is None else self.constraints[container]
            if constraint is HALF and self._adds_a_float(node):
                self.adds_a_float.add(node)
            elif container in self.natural or (container is None and self._is_half_by_nature(node, constraint)):
                self.natural.add(node)

    def floats(self, node: Any) -> list[Any]:
        """The operands that are float32 at run time, without those that are free in either dtype."""
        return [n for n in node.all_input_nodes if self.original[n] is torch.float32 and not self.is_free(n)]

    def is_free(self, value: Any) -> bool:
        """Available in either dtype without a cast at run time: constants, and new tensors that hold one number."""
        return self.block.constant(value) is not None or (
            is_filled(value) and value not in self.numbers.wide and value not in self.mutated
        )

    def _is_half_by_nature(self, node: Any, constraint: PrecisionConstraint) -> bool:
        return constraint is HALF or (constraint in (EITHER, WITH_OPERANDS) and self._follows_half(node))

    def _adds_a_float(self, node: Any) -> bool:
        """At O1, a matrix op with a fused residual that is float by nature; their sum is float by nature, too."""
        fused = node.target in (conv_act, linear_act) and self.level_of(node) == "O1"
        residual = argument(node, "residual") if fused else None
        return residual is not None and self.is_float_by_nature(residual)

    def _follows_half(self, node: Any) -> bool:
        """Its operands make an op half by nature: all of them at O1, one at O2."""
        floats = [n in self.natural for n in self.floats(node)]
        if self.level_of(node) != "O1":
            return any(floats) or not floats
        return bool(floats) and all(floats) and not any(map(self._is_rounded, node.all_input_nodes))

    def is_float_by_nature(self, value: Any) -> bool:
        """Half precision would round a float32 value that no half op has rounded yet."""
        if self.is_free(value):
            return self._is_rounded(value)
        return self.original[value] is torch.float32 and value not in self.natural

    def _is_rounded(self, value: Any) -> bool:
        """A constant that half precision cannot represent exactly."""
        constant = self.block.constant(value)
        if constant is None or constant.dtype is not torch.float32 or constant.dim() == 0:
            return False
        if value not in self.rounded:
            self.rounded[value] = not torch.equal(constant.to(self.half).float(), constant)
        return self.rounded[value]

    def level_of(self, node: Any) -> str:
        """The level that the options give to an op: a module before a kind of op, and the longest path, decides."""
        names = self.overrides.keys() & {short_name(node.target), *locations_of(node)} if self.overrides else ()
        return self.overrides[max(names, key=lambda name: (name not in NAMED, len(name)))] if names else self.level

    def _constraint(self, node: Any) -> PrecisionConstraint:
        why = self._why_not(node)
        if why is None:
            return self._by_table(node)
        return AS_IT_COMES if why == "" else in_float(why)

    def _why_not(self, node: Any) -> str | None:
        """Why an op stays in float whatever its entry in the table; "" where there is nothing to compute in half."""
        if is_region(node):
            return IS_CONTROL_FLOW
        read = [self.original[n] for n in node.all_input_nodes]
        given = [self.original[node], *(part.dtype for part in parts(node))]
        if node in self.mutated or not self.mutated.isdisjoint(node.all_input_nodes):
            return IS_WRITTEN if any(d is not None and d.is_floating_point for d in (*read, *given)) else ""
        if any(is_unknown(n) for n in (node, *node.all_input_nodes)):
            return IS_UNKNOWN
        if short_name(node.target) in NO_FLOATS:
            return ""
        if short_name(node.target) in CASTS and has_given_dtype(node):
            # A cast that becomes a no-op would return an alias of another value.
            return IS_A_CAST if dtype_of(node) is self.half and is_handed_out(derived(node)) else ""
        if torch.float64 in read or torch.float64 in given:
            return HAS_FLOAT64
        if torch.float32 not in (*read, *given) or has_given_dtype(node):
            return ""
        if any(d is not None and (d.is_complex or (d.is_floating_point and d not in (torch.float32, self.half)))
               for d in (*read, *given)):  # fmt: skip
            return HAS_OTHERS
        if record(node).keep_float:
            return KEEPS_FLOAT
        if self.level_of(node) == "float":
            return IS_KEPT
        if not self.log.allows(site_of(node)):
            return IS_SKIPPED
        if is_read_whole(node):
            return IS_READ_WHOLE
        if why := self.numbers.why_written(node):
            return why
        if is_filled(node):
            return ""
        if torch.float32 not in read:
            return MADE_IN_FLOAT
        if self._reads_large_integers(node):
            return READS_INTEGERS
        if why := self.numbers.why_read(node, self.floats(node)):
            return why
        return IS_A_PHASE if node in self.phases else IS_GUARDED if node in self.guarded else None

    def _reads_large_integers(self, node: Any) -> bool:
        """The op computes with integers, other than constants that half precision represents."""
        if short_name(node.target) not in FOLLOWS:
            return False
        indices = set(nodes_in([bound_arguments(node).get(name) for name in ("index", "indices")]))
        for operand in node.all_input_nodes:
            dtype, constant = self.original[operand], self.block.constant(operand)
            if operand in indices or dtype is None or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
                continue
            if constant is None or not torch.equal(constant.to(self.half).to(constant.dtype), constant):
                return True
        return False

    def _by_table(self, node: Any) -> PrecisionConstraint:
        name, level, floats = short_name(node.target), self.level_of(node), self.floats(node)
        all_half = all(n in self.natural for n in floats)
        if name in NO_KERNEL[self.half]:
            return in_float(LACKS_A_KERNEL)
        if name in MATRIX:
            return HALF
        if name in DECIDES:
            if not all_half or any(rounds(number, self.half) for number in self.numbers.numbers_of(node)):
                return in_float(DECIDED)
            return WITH_OPERANDS if self.original[node] is torch.float32 or parts(node) else AS_IT_COMES
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
        if name in FRAGILE or (name in INSIDE and not (floats and all_half)):
            return in_float(IS_FRAGILE)
        if name in INSIDE:
            return BETWEEN
        if self._follows_half(node):
            return EITHER
        return WITH_USERS if name in MOVES or level == "O2" else in_float(FOLLOWS_FLOAT)


def site_of(node: Any) -> str:
    return f"cast_half@{node.name}"


def has_given_dtype(node: Any) -> bool:
    """The op casts its operands to a dtype that the model states (a softmax in float32)."""
    to, name = bound_arguments(node).get("dtype"), short_name(node.target)
    return isinstance(to, torch.dtype) and name in NAMED and (to.is_floating_point or name in CASTS) and not is_filled(node)


def is_periodic(node: Any) -> bool:
    """Its result depends on the fraction of its operand alone, or drops that fraction."""
    to = bound_arguments(node).get("dtype") if short_name(node.target) in CASTS else None
    return short_name(node.target) in PERIODIC or (isinstance(to, torch.dtype) and not to.is_floating_point)


def is_pointwise(node: Any) -> bool:
    return short_name(node.target) in POINTWISE


def passes_a_phase_on(block: Block) -> Any:
    """Ops between a position and its sine: pointwise and shape ops, and a matrix op whose operands come from no matrix op."""
    after_product: set[Any] = set()
    for node in block.calls:
        if any(n in after_product or short_name(n.target) in MATRIX for n in nodes_in(node.args)):
            after_product.add(node)
    return lambda node: short_name(node.target) in MOVES_OR_FOLLOWS or (
        short_name(node.target) in MATRIX and node not in after_product
    )
