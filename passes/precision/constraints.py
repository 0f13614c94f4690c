"""What each op says to half precision before casts are placed.

    HALF           in half                                       matrix ops; at O3 whatever the table knows
    FLOAT          in float, with a reason                       fragile ops, and what would break
    EITHER         wherever casts are fewer                      ops that are as precise as their operands, behind half ones
    WITH_READERS   in half only where all its readers are        what only moves float values; at O2 all that no half op gave
    BETWEEN        the same, and its operands too                fragile ops whose half kernel computes in float inside
    WITH_OPERANDS  what its operands are                         searches: nothing is rounded for them
    AS_IT_COMES    takes what it gets                            explicit casts, comparisons, ops without float operands

A value is half *by nature* when a half op made it, and it went through nothing since that is fragile or met a float (O1), or
through something that had a half operand (O2). What is float by nature is rounded for matrix ops alone at O1. In WITH_READERS
and BETWEEN an op in half gives what it would give in float, rounded: for its readers nothing changes but the number of casts.
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
from ir_tools.ir.origin import origin
from ir_tools.ir.regions import is_region
from ir_tools.ir.view import upstream
from ir_tools.rewrite import Journal
from ir_tools.rewrite.cast import is_filled, is_read_whole, parts, whole
from ir_tools.rewrite.nearest import places_of
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
IS_FRAGILE = "norms, softmax, exponentials and long sums lose too much in half precision"
IS_A_CAST = "it casts to the dtype of another value"
IS_A_PHASE = "a sine, a cosine or a rounding is taken of it, where half precision has no digits behind the point"
IS_GUARDED = "a bound or a difference behind it needs more digits than half precision has"
DECIDED = "it compares floats, or floats with a number that half precision would round"
LACKS_A_KERNEL = "torch has no kernel for it in half precision on the CPU"
KEEPS_FLOAT = "the model switches autocast off around it"
IS_KEPT = "the options keep it in float"
IS_WRITTEN = "its operands or result are written in place"
HAS_FLOAT64 = "an operand or the result is float64"
HAS_OTHERS = "an operand or the result is complex, or of another half dtype"
IS_UNKNOWN = "unknown, give example_inputs: the dtype of a value that comes out of a list or dict"
MADE_IN_FLOAT = "it makes floats of what is none"
IS_CONTROL_FLOW = "branches and loops hand over floats"
IS_SKIPPED = "this site is skipped"
READS_INTEGERS = "integers take part in it, which half precision may not hold"
IS_RANDOM = "in another dtype it draws other random numbers"
IS_READ_WHOLE = "unknown, give example_inputs: somebody reads its results as one list"

WHY_FLOAT = {
    **dict.fromkeys(PERIODIC, IS_A_PHASE),
    **dict.fromkeys(CASTS, IS_A_CAST),
    **{name: why for why, names in STAYS_FLOAT.items() for name in names},
}

EXPECTED = frozenset(
    (FOLLOWS_FLOAT, IS_FRAGILE, IS_A_CAST, READS_WIDE, READS_TINY, IS_A_PHASE, IS_GUARDED, DECIDED, KEEPS_FLOAT, MADE_IN_FLOAT,
     IS_CONTROL_FLOW, IS_SKIPPED)
)  # fmt: skip
"""Reasons that go without saying: the report does not list them."""

POINTWISE = MOVES | FOLLOWS | INSIDE
KNOWN = POINTWISE | FRAGILE


@dataclass(frozen=True)
class Stance:
    """`side` is one of those above."""

    side: str
    reason: str = ""


HALF, EITHER, WITH_READERS, BETWEEN = map(Stance, ("half", "either", "with readers", "between"))
WITH_OPERANDS, AS_IT_COMES = map(Stance, ("with operands", "as it comes"))


def in_float(reason: str) -> Stance:
    return Stance("float", reason)


@dataclass
class Policy:
    """The stance of every op of a Block.

    `natural`: values that are half by nature. `adds_a_float`: fused ops that O1 wants apart (`half_residuals`).
    """

    block: Block
    half: torch.dtype
    level: str
    overrides: Mapping[str, str]
    journal: Journal
    stances: dict[Any, Stance] = field(default_factory=dict)
    natural: set[Any] = field(default_factory=set)
    rounded: dict[Any, bool] = field(default_factory=dict)
    adds_a_float: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.numbers = Numbers(self.block, self.half, self.journal)
        self.guarded = upstream(self.block, self.numbers.guards.__contains__, is_pointwise)
        self.mutated = self.block.mutated_values
        self.original = {node: dtype_of(node) for node in self.block.nodes}
        self.phases = upstream(self.block, is_periodic, passes_a_phase_on(self.block))
        for node in self.block.calls:
            container = whole(node)
            self.stances[node] = stance = self._stance(node) if container is None else self.stances[container]
            if stance is HALF and self._adds_a_float(node):
                self.adds_a_float.add(node)
            elif container in self.natural or (container is None and self._is_half_by_nature(node, stance)):
                self.natural.add(node)

    def floats(self, node: Any) -> list[Any]:
        """The operands that are float32 when the model runs, without those that are there in either dtype."""
        return [n for n in node.all_input_nodes if self.original[n] is torch.float32 and not self.is_free(n)]

    def is_free(self, value: Any) -> bool:
        """There in either dtype without a cast at run time: constants, and new tensors that hold one number."""
        return self.block.constant(value) is not None or (
            is_filled(value) and value not in self.numbers.wide and value not in self.mutated
        )

    def _is_half_by_nature(self, node: Any, stance: Stance) -> bool:
        return stance is HALF or (stance in (EITHER, WITH_OPERANDS) and self._follows_half(node))

    def _adds_a_float(self, node: Any) -> bool:
        """At O1, a product with a residual that is float by nature; their sum is, too."""
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
        """Half precision would take digits from a float32 value that no half op took before."""
        if self.is_free(value):
            return self._is_rounded(value)
        return self.original[value] is torch.float32 and value not in self.natural

    def _is_rounded(self, value: Any) -> bool:
        """A constant that half precision does not hold as it is."""
        constant = self.block.constant(value)
        if constant is None or constant.dtype is not torch.float32 or constant.dim() == 0:
            return False
        if value not in self.rounded:
            self.rounded[value] = not torch.equal(constant.to(self.half).float(), constant)
        return self.rounded[value]

    def level_of(self, node: Any) -> str:
        """The level that the options give to an op: a module before a kind of op, and the longest path, decides."""
        names = self.overrides.keys() & {short_name(node.target), *places_of(node)} if self.overrides else ()
        return self.overrides[max(names, key=lambda name: (name not in NAMED, len(name)))] if names else self.level

    def _stance(self, node: Any) -> Stance:
        why = self._why_not(node)
        if why is None:
            return self._by_table(node)
        return AS_IT_COMES if why == "" else in_float(why)

    def _why_not(self, node: Any) -> str | None:
        """Why an op is computed in float whatever the table says of it; "" where there is nothing to compute in half."""
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
        if short_name(node.target) in CASTS and is_told_its_dtype(node):
            # A cast that became none would hand out the memory of another value.
            return IS_A_CAST if dtype_of(node) is self.half and is_handed_out(derived(node)) else ""
        if torch.float64 in read or torch.float64 in given:
            return HAS_FLOAT64
        if torch.float32 not in (*read, *given) or is_told_its_dtype(node):
            return ""
        if any(d is not None and (d.is_complex or (d.is_floating_point and d not in (torch.float32, self.half)))
               for d in (*read, *given)):  # fmt: skip
            return HAS_OTHERS
        if origin(node).keep_float:
            return KEEPS_FLOAT
        if self.level_of(node) == "float":
            return IS_KEPT
        if not self.journal.allows(site_of(node)):
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
        """Integers that take part in the arithmetic, unless they are constants that half precision holds."""
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

    def _by_table(self, node: Any) -> Stance:
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
            return in_float(f"{name} is in no table of cast_half")
        if level == "O3":
            return HALF
        if name in FRAGILE or (name in INSIDE and not (floats and all_half)):
            return in_float(IS_FRAGILE)
        if name in INSIDE:
            return BETWEEN
        if self._follows_half(node):
            return EITHER
        return WITH_READERS if name in MOVES or level == "O2" else in_float(FOLLOWS_FLOAT)


def site_of(node: Any) -> str:
    return f"cast_half@{node.name}"


def is_told_its_dtype(node: Any) -> bool:
    """The op casts its operands to a dtype that the model states (a softmax in float32)."""
    told, name = bound_arguments(node).get("dtype"), short_name(node.target)
    return isinstance(told, torch.dtype) and name in NAMED and (told.is_floating_point or name in CASTS) and not is_filled(node)


def is_periodic(node: Any) -> bool:
    """What its operand has behind the point is all that counts, or is cut off."""
    told = bound_arguments(node).get("dtype") if short_name(node.target) in CASTS else None
    return short_name(node.target) in PERIODIC or (isinstance(told, torch.dtype) and not told.is_floating_point)


def is_pointwise(node: Any) -> bool:
    return short_name(node.target) in POINTWISE


def passes_a_phase_on(block: Block) -> Any:
    """Ops between a position and the sine of it: pointwise and shape ops, and a product that no other product feeds."""
    after_product: set[Any] = set()
    for node in block.calls:
        if any(n in after_product or short_name(n.target) in MATRIX for n in nodes_in(node.args)):
            after_product.add(node)
    return lambda node: short_name(node.target) in MOVES_OR_FOLLOWS or (
        short_name(node.target) in MATRIX and node not in after_product
    )
