"""Which ops stay in float for their numbers: literals in the model, values of constants, ranges observed on data.

    beyond the range of half         float; a mask is clamped where it is cast
    below its smallest number        float, with the value that the number keeps from zero: x / (norm + 1e-12)
    observed not to fit              float, with its users, except attention that reads it as a mask
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.dialect import bound_arguments, nodes_in, numbers_in, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.verify.ranges import Range, Ranges, range_of
from passes.precision.op_table import CASTS, FLOAT_PARAMETERS, FOLLOWS, INSIDE, MATRIX, MOVES
from passes.precision.representable import is_lost, is_near_the_end

IS_WIDE = "a number in it exceeds the range of half precision; its result is clamped where it is cast"
READS_WIDE = "an operand may exceed the range of half precision"
IS_TINY = "it keeps values from zero or one by a number that half precision loses"
READS_TINY = "an operand is kept from zero or one by a number that half precision loses"
OVERFLOWS = "on the example data its result exceeds the range of half precision, or nearly does"
LOSES = "on the example data its result is so small that half precision loses it"
READS_UNFIT = "on the example data an operand does not fit into half precision"
SOURCE_UNFIT = "on the example data a part of its result does not fit into half precision"
CANCELS = "on the example data it is a small difference of larger numbers that half precision cannot distinguish"
CONSTANT_LOST = "a constant operand is so small that half precision loses it"
VALUE_CLAMPED = "a mask computed from it may exceed the range of half precision; it is clamped where it is cast"
CLAMPED = "a constant operand exceeds the range of half precision; it is clamped to that range"

MASKS = {"scaled_dot_product_attention": "attn_mask"}
"""Operands that are added before a softmax: clamped to the range of half precision, they still mask."""

DIVIDES = {"div": "other", **dict.fromkeys("reciprocal rsqrt log log2 log10 pow".split(), "self")}
"""Ops and the operand in which a zero makes an infinity."""

ADDS = frozenset("add sub rsub where masked_fill maximum minimum".split())
"""Ops whose constants may be masks."""

MOVES_OR_FOLLOWS, MOVES_OR_ADDS = MOVES | FOLLOWS, MOVES | ADDS

SUMS = frozenset("add sub rsub".split())
BOUNDS = frozenset("clamp clamp_min clamp_max clip hardtanh".split())
"""Ops whose numbers may keep a value from 1 or -1, where a log or quotient is infinite: log(1 - p.clamp(max=1 - 1e-7))."""

SCALES = frozenset("mul div".split())
"""Ops whose number keeps nothing from zero."""


@dataclass
class Numbers:
    """Why ops of a Block stay in float for their numbers. Call `why_written` and `why_read` in order of execution.

    `wide` and `tiny`: values that a literal of the model takes beyond half's range, or that a literal below its smallest
    number keeps from zero. `unfit`: values observed not to fit on example data, and why. `guards`: bounds and differences
    whose operands need every digit.
    """

    block: Block
    half: torch.dtype
    ranges: Ranges
    wide: set[Any] = field(default_factory=set)
    tiny: set[Any] = field(default_factory=set)
    of_constants: dict[Any, Range] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.limits = torch.finfo(self.half)
        self.divisors = divisors(self.block)
        self.masks = mask_inputs(self.block)
        if self.half is torch.float16:
            self.wide |= self.masks  # -65504 - 20 is -inf already, while in bfloat16 the lowest number swallows what is added
        differences = {node for node in self.divisors if self._cancels(node)}
        self.cancelling = {value for node in differences for value in (node, *node.all_input_nodes)}
        for node in self.block.calls:  # and the ops that move them to a division
            if short_name(node.target) in MOVES and not differences.isdisjoint(node.all_input_nodes):
                differences.add(node)
        self.cancelling |= differences
        values = (*self.block.placeholders, *self.block.calls)
        self.unfit = {value: why for value in values if (why := self._why_unfit(value)) is not None}
        for node in reversed(self.block.calls):  # the operand of an op that moves a value that does not fit
            if node in self.unfit and short_name(node.target) in MOVES:
                self.unfit |= {n: SOURCE_UNFIT for n in node.all_input_nodes if n not in self.unfit}
        self.guards = self.cancelling | {node for node in self.block.calls if self._keeps_from_one(node)}

    def why_written(self, node: Any) -> str | None:
        """Why a literal of an op keeps it in float; also for ops without float operands."""
        numbers = [abs(number) for number in self.numbers_of(node) if 0 < abs(number) < math.inf]
        name = short_name(node.target)
        if dtype_of(node) is torch.float32 and any(number >= self.limits.max for number in numbers):
            self.wide.add(node)
            return IS_WIDE
        if node in self.guards or (name not in INSIDE and any(number < self.limits.smallest_normal for number in numbers)):
            if name not in SCALES:
                self.tiny.add(node)
            return CANCELS if node in self.cancelling else IS_TINY
        return None

    def why_read(self, node: Any, floats: list[Any]) -> str | None:
        """Why the values of its operands (`floats`, and constants) or of its result keep an op in float."""
        name = short_name(node.target)
        if name in MOVES_OR_FOLLOWS and not self.wide.isdisjoint(floats):
            self.wide.add(node)
            return READS_WIDE
        if why := self.unfit.get(node) or self._why_constants(node):
            return why
        mask = bound_arguments(node).get(MASKS.get(name, ""))
        if any(n in self.unfit and n is not mask for n in floats):
            return READS_UNFIT
        if name not in MATRIX and not self.tiny.isdisjoint(node.all_input_nodes):
            if len(floats) <= 1 or name in MOVES:
                self.tiny.add(node)
            return READS_TINY
        return None

    def numbers_of(self, node: Any) -> list[float]:
        """The numbers that an op computes with: literals, and constants that are one number."""
        read = () if short_name(node.target) in MATRIX else node.all_input_nodes
        constants = [self.block.constant(n) for n in read if dtype_of(n) is torch.float32]
        return [*numbers_in(node), *(float(c) for c in constants if c is not None and c.numel() == 1)]

    def _why_constants(self, node: Any) -> str | None:
        """Why the constants of an op need float. Added constants may be masks, and are clamped; small biases may be lost."""
        name, given = short_name(node.target), bound_arguments(node)
        biases = (given.get("bias"), given.get("b"))
        stay = [given.get(argument) for argument in FLOAT_PARAMETERS.get(name, ())]
        for constant in [n for n in node.all_input_nodes if self.block.constant(n) is not None and n not in stay]:
            tensor = self.block.constants[str(constant.target)]
            if tensor.dtype is not torch.float32 or tensor.numel() == 0:
                continue
            if constant not in self.of_constants:
                self.of_constants[constant] = range_of(tensor)
            seen = self.of_constants[constant]
            if seen.largest > self.limits.max and name not in ADDS and constant is not given.get(MASKS.get(name, "")):
                self.wide.add(node)
                return IS_WIDE
            if constant not in biases and is_lost(seen, self.half, is_divisor=constant in self.divisors):
                return CONSTANT_LOST
        return None

    def _cancels(self, node: Any) -> bool:
        """A sum that a division or logarithm reads, observed to be as small as the rounding errors of its terms."""
        seen = self.ranges.get(node.name)
        if seen is None or short_name(node.target) not in SUMS:
            return False
        terms = [self.ranges[n.name].largest for n in node.all_input_nodes if n.name in self.ranges]
        literals = [abs(n) for name, n in bound_arguments(node).items() if name != "alpha" and isinstance(n, (int, float))]
        return seen.smallest < self.limits.eps * max([*terms, *literals], default=0.0)

    def _keeps_from_one(self, node: Any) -> bool:
        """A bound that keeps values from a whole number, and that half precision would round to that number."""
        numbers = [n for n in numbers_in(node) if 0 < abs(n) < math.inf] if short_name(node.target) in BOUNDS else []
        return any(not float(n).is_integer() and as_half(n, self.half).is_integer() for n in numbers)

    def _why_unfit(self, value: Any) -> str | None:
        """Why the values observed on example data need float, None when they do not."""
        seen = self.ranges.get(value.name) if dtype_of(value) is torch.float32 else None
        if seen is None:
            return None
        if value in self.cancelling:
            return CANCELS
        if is_near_the_end(seen, self.half):
            return OVERFLOWS
        return LOSES if is_lost(seen, self.half, is_divisor=value in self.divisors) else None


def mask_inputs(block: Block) -> set[Any]:
    """Inputs, and results of the model's own casts, that reach a softmax through sums and moves alone.

    A mask may hold -1e9, whatever the examples held.
    """
    found: set[Any] = set()
    for node in reversed(block.calls):
        name = short_name(node.target)
        if name in ("softmax", "log_softmax") or (node in found and name in MOVES_OR_ADDS):
            found.update(node.all_input_nodes)
        elif name in MASKS:
            found.update(nodes_in(bound_arguments(node)[MASKS[name]]))
    roots = (*block.placeholders, *(node for node in block.calls if short_name(node.target) in CASTS))
    return {value for value in roots if value in found and dtype_of(value) is torch.float32}


def divisors(block: Block) -> set[Any]:
    """Values in which a zero makes an infinity: operands of divisions and logarithms, and the values moved to them."""
    found: set[Any] = set()
    for node in reversed(block.calls):
        name = short_name(node.target)
        if name in DIVIDES:
            found.update(nodes_in(bound_arguments(node).get(DIVIDES[name])))
        elif name in MOVES and node in found:
            found.update(node.all_input_nodes)
    return found


def as_half(number: float, half: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=half))


def rounds(number: float, half: torch.dtype) -> bool:
    return as_half(number, half) != number
