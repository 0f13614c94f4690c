"""Which ops half precision would break by their numbers: literals in the model, values of constants, ranges observed on data.

    beyond the range of half         float; a mask is clamped where it is cast
    below its smallest number        float, with the value that the number keeps from zero: x / (norm + 1e-12)
    observed not to fit              float, with its users, except attention that reads it as a mask

One forward sweep gives each value its hazard, from those of the operands; what an op is read for (divisors, masks, guards,
phases) was found backwards before. A hazard depends on the graph, its numbers and the dtype, and on nothing that a user may
ask for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.dataflow import forward
from ir_tools.ir.dialect import argument, bound_arguments, getitem, nodes_in, short_name
from ir_tools.ir.facts import dtype as dtype_of
from ir_tools.ir.regions import is_region
from ir_tools.rewrite.cast import is_filled, is_read_whole, whole
from passes.analysis.roles import ADDS, MASKS, divisors, mask_values
from passes.analysis.value_ranges import ValueRanges
from passes.precision import guards
from passes.precision.eligibility import reads_float32, why_ineligible
from passes.precision.guards import MOVES_OR_FOLLOWS
from passes.precision.op_table import CASTS, FLOAT_PARAMETERS, FOLLOWS, INSIDE, MATRIX, MOVES
from passes.precision.reasons import (
    CANCELS,
    CONSTANT_LOST,
    IS_A_PHASE,
    IS_GUARDED,
    IS_TINY,
    IS_WIDE,
    READS_INTEGERS,
    READS_TINY,
    READS_UNFIT,
    READS_WIDE,
)
from passes.precision.representable import is_lost
from passes.precision.unfit import cancelling_values, unfit_values

SCALES = frozenset("mul div".split())
"""Ops whose number keeps nothing from zero."""


@dataclass(frozen=True)
class Hazard:
    """What is wrong with one value in half precision.

    `ineligible`: why no dtype can be chosen for its op at all ("": it computes nothing in float32). `wide`: a number of the
    model may take it beyond the range. `tiny`: a number below the smallest one keeps it from zero. `written`, `read`: why a
    literal of its op, or the operands or the result, keep the op in float.
    """

    wide: bool = False
    tiny: bool = False
    written: str | None = None
    read: str | None = None
    ineligible: str | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """What the sweep reads beside the graph. `unfit`: values observed not to fit, and why. `cancelling`: small differences,
    and their terms. `guards`: bounds and differences whose operands need every digit; `guarded` and `phases` lead to them and
    to sines. `mutated`: what is written in place.
    """

    values: ValueRanges
    half: torch.dtype
    mutated: Set[Any]
    divisors: Set[Any]
    masks: Set[Any]
    cancelling: Set[Any]
    unfit: Mapping[Any, str]
    guards: Set[Any]
    guarded: Set[Any]
    phases: Set[Any]

    @classmethod
    def of(cls, values: ValueRanges, half: torch.dtype) -> Reading:
        block = values.block
        zeros = divisors(block, MOVES)
        cancelling = cancelling_values(values, half, zeros)
        unfit = unfit_values(values, half, zeros, cancelling)
        bounds = cancelling | {node for node in block.calls if guards.keeps_from_one(node, half)}
        leading = guards.guarded_values(block, bounds), guards.phases(block)
        return cls(values, half, block.mutated_values, zeros, masks(block), cancelling, unfit, bounds, *leading)


@dataclass(frozen=True, eq=False)
class Hazards:
    """The hazard of each value of a Block in the dtype `half`; computed once, before anything is decided."""

    reading: Reading
    by_value: Mapping[Any, Hazard]

    @classmethod
    def of(cls, values: ValueRanges, half: torch.dtype) -> Hazards:
        reading = Reading.of(values, half)
        return cls(reading, forward(values.block, lambda node, known: hazard(node, known, reading)))

    def __getitem__(self, value: Any) -> Hazard:
        return self.by_value[value]

    @property
    def block(self) -> Block:
        return self.reading.values.block

    @property
    def half(self) -> torch.dtype:
        return self.reading.half

    def is_clamped(self, value: Any) -> bool:
        """The result of an op may lie beyond the range of half: it is clamped to it where it is cast."""
        return self[value].wide or value in self.reading.unfit

    @property
    def clamped_inputs(self) -> Set[Any]:
        """The same of inputs, and of what the model itself casts."""
        return self.reading.masks | (self.reading.unfit.keys() & set(self.block.placeholders))

    def floats(self, node: Any) -> list[Any]:
        """The operands that are float32 at run time, without those that are free in either dtype."""
        return floats(node, self.by_value, self.reading)

    def is_free(self, value: Any) -> bool:
        return is_free(value, self.by_value, self.reading)


def masks(block: Block) -> frozenset[Any]:
    """Inputs, and results of the model's own casts and of regions, that reach a softmax.

    A mask may hold -1e9, whatever the examples held.
    """
    given = (node for node in block.calls if short_name(node.target) in CASTS or is_result_of_region(node))
    return mask_values(block, MOVES) & {value for value in (*block.placeholders, *given) if dtype_of(value) is torch.float32}


def is_result_of_region(node: Any) -> bool:
    return node.target is getitem and is_region(argument(node, "container"))


def hazard(node: Any, known: Mapping[Any, Hazard], reading: Reading) -> Hazard:
    """The hazard of a value, from those of its operands in `known`."""
    # -65504 - 20 is -inf already, while in bfloat16 the lowest number swallows what is added.
    is_wide = reading.half is torch.float16 and node in reading.masks
    if (container := whole(node)) is not None:
        return Hazard(known[container].wide, known[container].tiny)
    ineligible = why_ineligible(node, reading.mutated, reading.half) if node.op == "call_function" else ""
    if ineligible is not None or is_read_whole(node):
        return Hazard(is_wide, ineligible=ineligible)
    name, numbers = short_name(node.target), numbers_of(node, reading.values)
    if why := why_written(node, numbers, reading):
        return Hazard(is_wide or why == IS_WIDE, why != IS_WIDE and name not in SCALES, written=why)
    if not reads_float32(node):
        return Hazard(wide=is_wide)
    why = why_read(node, known, reading)
    passes_tiny = why == READS_TINY and (len(floats(node, known, reading)) <= 1 or name in MOVES)
    return Hazard(is_wide or why in (IS_WIDE, READS_WIDE), passes_tiny, read=why)


def numbers_of(node: Any, values: ValueRanges) -> list[float]:
    """The numbers that an op computes with: literals, and constants that are one number."""
    read = () if short_name(node.target) in MATRIX else node.all_input_nodes
    return [*values[node].literals, *(number for n in read if (number := values[n].number) is not None)]


def why_written(node: Any, numbers: list[float], reading: Reading) -> str | None:
    """Why a literal of an op keeps it in float; also for ops without float operands."""
    limits, name = torch.finfo(reading.half), short_name(node.target)
    sizes = [abs(number) for number in numbers if 0 < abs(number) < math.inf]
    if dtype_of(node) is torch.float32 and any(size >= limits.max for size in sizes):
        return IS_WIDE
    if node in reading.guards or (name not in INSIDE and any(size < limits.smallest_normal for size in sizes)):
        return CANCELS if node in reading.cancelling else IS_TINY
    return None


def why_read(node: Any, known: Mapping[Any, Hazard], reading: Reading) -> str | None:
    """Why the values of its operands and constants, or of its result, keep an op in float."""
    name, read = short_name(node.target), floats(node, known, reading)
    if reads_large_integers(node, reading):
        return READS_INTEGERS
    if name in MOVES_OR_FOLLOWS and any(known[n].wide for n in read):
        return READS_WIDE
    if why := reading.unfit.get(node) or why_constants(node, reading):
        return why
    mask = bound_arguments(node).get(MASKS.get(name, ""))
    if any(n in reading.unfit and n is not mask for n in read):
        return READS_UNFIT
    if name not in MATRIX and any(known[n].tiny for n in node.all_input_nodes):
        return READS_TINY
    return IS_A_PHASE if node in reading.phases else IS_GUARDED if node in reading.guarded else None


def why_constants(node: Any, reading: Reading) -> str | None:
    """Why the constants of an op need float. Added constants may be masks, and are clamped; small biases may be lost."""
    name, given, half = short_name(node.target), bound_arguments(node), reading.half
    mask, biases = given.get(MASKS.get(name, "")), (given.get("bias"), given.get("b"))
    stay = [given.get(argument) for argument in FLOAT_PARAMETERS.get(name, ())]
    for constant in node.all_input_nodes:
        seen = reading.values[constant].constant
        if seen is None or constant in stay or dtype_of(constant) is not torch.float32:
            continue
        if seen.largest > torch.finfo(half).max and name not in ADDS and constant is not mask:
            return IS_WIDE
        if constant not in biases and is_lost(seen, half, is_divisor=constant in reading.divisors):
            return CONSTANT_LOST
    return None


def reads_large_integers(node: Any, reading: Reading) -> bool:
    """The op computes with integers, other than constants that half precision represents."""
    if short_name(node.target) not in FOLLOWS:
        return False
    indices = set(nodes_in([bound_arguments(node).get(name) for name in ("index", "indices")]))
    for operand in node.all_input_nodes:
        dtype, constant = dtype_of(operand), reading.values.block.constant(operand)
        if operand in indices or dtype is None or dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
            continue
        if constant is None or not torch.equal(constant.to(reading.half).to(constant.dtype), constant):
            return True
    return False


def floats(node: Any, known: Mapping[Any, Hazard], reading: Reading) -> list[Any]:
    """The operands that are float32 at run time, without those that are free in either dtype."""
    return [n for n in node.all_input_nodes if dtype_of(n) is torch.float32 and not is_free(n, known, reading)]


def is_free(value: Any, known: Mapping[Any, Hazard], reading: Reading) -> bool:
    """Available in either dtype without a cast at run time: constants, and new tensors that hold one number."""
    return reading.values.block.constant(value) is not None or (
        is_filled(value) and not known[value].wide and value not in reading.mutated
    )
