"""What values are read as, seen backwards from the ops that read them: divisors, and masks of a softmax.

    is_divisor(v)   =   some user divides by v, or takes its logarithm, or moves v and is_divisor(user)
    is_mask(v)      =   some user is a softmax, or attention that adds v, or moves or adds v and is_mask(user)

`moves`: the names of ops that move or select values. They differ with what is asked: what merely moves numbers of one dtype
may round those of another.
"""

from collections.abc import Mapping, Set
from operator import or_
from typing import Any

from ir_tools.ir import Block
from ir_tools.ir.dataflow import backward
from ir_tools.ir.dialect import bound_arguments, nodes_in, short_name

SOFTMAXES = frozenset({"softmax", "log_softmax"})
MASKS = {"scaled_dot_product_attention": "attn_mask"}
"""Operands that are added before a softmax: clamped to the range of a narrower dtype, they still mask."""

DIVIDES = {"div": "other", **dict.fromkeys("reciprocal rsqrt log log2 log10 pow".split(), "self")}
"""Ops and the operand in which a zero makes an infinity."""

ADDS = frozenset("add sub rsub where masked_fill maximum minimum".split())
"""Ops whose constants may be masks."""


def divisors(block: Block, moves: Set[str]) -> frozenset[Any]:
    """Values in which a zero makes an infinity: operands of divisions and logarithms, and the values moved to them."""

    def divides(user: Any, value: Any, is_divisor: bool) -> bool:
        name = short_name(user.target)
        return reads_as(user, value, DIVIDES) if name in DIVIDES else is_divisor and name in moves

    return _all_true(backward(block, divides, or_, False))


def mask_values(block: Block, moves: Set[str]) -> frozenset[Any]:
    """Values that reach a softmax through sums and moves alone, and those that attention adds before one."""
    passes_on = moves | ADDS

    def masks(user: Any, value: Any, is_mask: bool) -> bool:
        name = short_name(user.target)
        return name in SOFTMAXES or (is_mask and name in passes_on) or reads_as(user, value, MASKS)

    return _all_true(backward(block, masks, or_, False))


def reads_as(user: Any, value: Any, operands: Mapping[str, str]) -> bool:
    """`user` is an op of the table `operands`, and `value` its operand of that name."""
    argument = operands.get(short_name(user.target))
    return argument is not None and value in nodes_in(bound_arguments(user).get(argument))


def _all_true(known: Mapping[Any, bool]) -> frozenset[Any]:
    return frozenset(value for value, holds in known.items() if holds)
