"""Values of which every digit is needed: what a bound keeps from one, what a sine or rounding is computed from.

    log(1 - p.clamp(max=1 - 1e-7))      half precision rounds the bound to 1, and the logarithm is infinite
    sin(1000 * x)                       a phase: half precision has no digits behind the point of 1000

What leads to such a value, over pointwise ops, needs its digits too.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch

from ir_tools.ir import Block
from ir_tools.ir.dataflow import forward, upstream
from ir_tools.ir.dialect import bound_arguments, nodes_in, numbers_in, short_name
from passes.precision.op_table import CASTS, FOLLOWS, INSIDE, MATRIX, MOVES, PERIODIC

BOUNDS = frozenset("clamp clamp_min clamp_max clip hardtanh".split())
"""Ops whose numbers may keep a value from 1 or -1, where a log or quotient is infinite: log(1 - p.clamp(max=1 - 1e-7))."""

MOVES_OR_FOLLOWS, POINTWISE = MOVES | FOLLOWS, MOVES | FOLLOWS | INSIDE


def keeps_from_one(node: Any, half: torch.dtype) -> bool:
    """A bound that keeps values from a whole number, and that half precision would round to that number."""
    numbers = [n for n in numbers_in(node) if 0 < abs(n) < math.inf] if short_name(node.target) in BOUNDS else []
    return any(not float(n).is_integer() and as_half(n, half).is_integer() for n in numbers)


def guarded_values(block: Block, guards: frozenset[Any]) -> frozenset[Any]:
    """What leads to a guard over pointwise ops."""
    return upstream(block, guards.__contains__, lambda node: short_name(node.target) in POINTWISE)


def phases(block: Block) -> frozenset[Any]:
    """What leads to a sine or rounding: over pointwise and shape ops, and a matrix op whose operands come from no matrix op."""

    def is_after_product(node: Any, known: Mapping[Any, bool]) -> bool:
        read = nodes_in(node.args) if node.op == "call_function" else ()
        return any(known[n] or short_name(n.target) in MATRIX for n in read)

    after_product = forward(block, is_after_product)

    def passes_on(node: Any) -> bool:
        name = short_name(node.target)
        return name in MOVES_OR_FOLLOWS or (name in MATRIX and not after_product[node])

    return upstream(block, is_periodic, passes_on)


def is_periodic(node: Any) -> bool:
    """Its result depends on the fraction of its operand alone, or drops that fraction."""
    to = bound_arguments(node).get("dtype") if short_name(node.target) in CASTS else None
    return short_name(node.target) in PERIODIC or (isinstance(to, torch.dtype) and not to.is_floating_point)


def as_half(number: float, half: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=half))


def rounds(number: float, half: torch.dtype) -> bool:
    return as_half(number, half) != number
