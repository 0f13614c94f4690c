"""Drop what computes its own operand.

    x * 1,  x / 1,  x ** 1,  x - 0                      ->  x         1, 0: a number, or a constant full of them
    x + 0                                               ->  x         integers; floats where it is -0.0
    cat([x]),  clone(x),  contiguous(x)                 ->  x         the memory lies as before
    slice(x),  expand(x),  repeat(x, 1, ...)            ->  x         of all there is, to its own shape, once
    pad(x, [0, ...]),  to(x, its dtype)                 ->  x
    -(-x),  logical_not and bitwise_not twice           ->  x
    relu, abs, ceil, floor, round, trunc, sign twice    ->  once
    clamp, hardtanh twice within the same bounds        ->  once

A float keeps its zeros apart: `-0.0 + 0` is `0.0`, while `-0.0 - 0` and `-0.0 + -0.0` are `-0.0` (IEEE 754, 6.3).
"""

import math

import torch
from torch import Tensor

from ir_tools.rewrite import Known, Rule, Value, rule_pass


def product_or_quotient(op, x: Value, c: Known | float):
    return op.one_of(op.mul(x, c), op.div(x, c, rounding_mode=None))


def power(op, x: Value):
    return op.pow(x, 1)


def sum_or_difference(op, x: Value, c: Known | float):
    return op.one_of(op.add(x, c, ..., name="sum"), op.sub(x, c, ..., name="sum"))


def copy_part_or_repetition(op, x: Value, dtype: torch.dtype):
    copies = op.clone(x, ..., name="y"), op.contiguous(x, ..., name="y"), op.cat([x], ..., name="y")
    parts = op.slice(x, ..., step=1, name="y"), op.expand(x, ..., name="y"), op.repeat(x, ..., name="y")
    return op.one_of(*copies, *parts, op.to(x, dtype, ..., copy=False, name="y"))


def padding(op, x: Value, pad: list):
    return op.one_of(op.constant_pad_nd(x, pad, ...), op.pad(x, pad, ...))


def undone(op, x: Value):
    functions = op.neg, op.logical_not, op.bitwise_not
    return op.one_of(*(f(f(x)) for f in functions))


def done_again(op, x: Value, low: float | None, high: float | None):
    functions = op.relu, op.abs, op.ceil, op.floor, op.trunc, op.sign
    rounded = op.round(op.round(x, decimals=None, name="once"), decimals=None)  # to decimals, it moves the last bit again
    bounded = (f(f(x, low, high, name="once"), low, high) for f in (op.clamp, op.hardtanh))
    return op.one_of(*(f(f(x, name="once")) for f in functions), rounded, *bounded)


def is_filled_with(c, number):
    """A number is `number`, or every element of a tensor."""
    return bool((c == number).all()) and c.numel() > 0 if isinstance(c, Tensor) else c == number


def constant_is_one(c):
    """The constant is one everywhere."""
    return is_filled_with(c, 1)


def constant_is_zero(c):
    """The constant is zero everywhere."""
    return is_filled_with(c, 0)


def looks_alike(x, y):
    """The result has the shape and dtype of the operand, and lies in memory as it does."""
    return x.shape is not None and x.shape == y.shape and x.dtype == y.dtype and x.lies_like(y)


def nothing_is_padded(pad):
    """Each axis is padded by nothing."""
    return all(p == 0 for p in pad)


def is_real(x):
    """The operand is real (a complex product multiplies by the zero beside the one too, which Inf and -0.0 show)."""
    return None if x.dtype is None else not x.dtype.is_complex


def keeps_the_sign_of_zero(sum, x, c):
    """The zeros keep their signs: integers have none, and of floats -0.0 + 0 is 0.0."""
    if x.dtype is None or not x.dtype.is_floating_point:
        return None if x.dtype is None else True
    wanted = sum.target.overloadpacket is torch.ops.aten.add
    signs = c.double().signbit() if isinstance(c, Tensor) else torch.tensor(math.copysign(1, c) < 0)
    return sum.alpha == 1 and bool((signs == wanted).all())


def operand(x):
    return x


def first_result(once):
    return once


def neutral(name, match, *when, requires=()):
    return Rule(name, match=match, when=when, requires=requires, replace=operand, takes_runtime_numbers=True)


remove_neutral_ops = rule_pass(
    "remove_neutral_ops",
    [
        neutral("x * 1 -> x", product_or_quotient, constant_is_one, requires=(is_real,)),
        neutral("x ** 1 -> x", power),
        neutral("x + 0 -> x", sum_or_difference, constant_is_zero, requires=(is_real, keeps_the_sign_of_zero)),
        neutral("copy(x) -> x", copy_part_or_repetition, looks_alike),
        neutral("pad(x, 0) -> x", padding, nothing_is_padded),
        neutral("-(-x), not(not(x)) -> x", undone),
        Rule("f(f(x)) -> f(x)", match=done_again, replace=first_result),
    ],
    effects=(),
    doc=__doc__,
)  # fmt: skip
