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


def product(op, x: Value, c: Known | float):
    return op.mul(x, c)


def quotient(op, x: Value, c: Known | float):
    return op.div(x, c, rounding_mode=None)


def power(op, x: Value):
    return op.pow(x, 1)


def difference(op, x: Value, c: Known | float):
    return op.sub(x, c, ..., name="sum")


def sum_with_constant(op, x: Value, c: Known | float):
    return op.add(x, c, ..., name="sum")


def cat_of_one(op, x: Value):
    return op.cat([x], ...)


def copy_alike(op, x: Value):
    return op.one_of(op.clone(x, ..., name="y"), op.contiguous(x, ..., name="y"))


def part_or_expansion(op, x: Value):
    return op.one_of(op.slice(x, ..., step=1, name="y"), op.expand(x, ..., name="y"))


def repetition(op, x: Value, times: list):
    return op.repeat(x, times)


def padding(op, x: Value, pad: list):
    return op.one_of(op.constant_pad_nd(x, pad, ...), op.pad(x, pad, ...))


def cast(op, x: Value, dtype: torch.dtype):
    return op.to(x, dtype, ..., copy=False, name="y")


def clamp_twice(op, x: Value, low: float | None, high: float | None):
    return op.clamp(op.clamp(x, low, high, name="once"), low, high)


def hardtanh_twice(op, x: Value, low: float, high: float):
    return op.hardtanh(op.hardtanh(x, low, high, name="once"), low, high)


def twice(name):
    """A left side: `name` applied to its own result. (Rounding to decimals twice moves the last bit.)"""

    def match(op, x: Value):
        return getattr(op, name)(getattr(op, name)(x, decimals=None, name="once"), decimals=None)

    match.__name__ = f"{name}_twice"
    return match


def is_filled_with(c, number):
    """A number is `number`, or every element of a tensor."""
    return bool((c == number).all()) and c.numel() > 0 if isinstance(c, Tensor) else c == number


def constant_is_one(c):
    """The constant is one everywhere."""
    return is_filled_with(c, 1)


def constant_is_zero(c):
    """The constant is zero everywhere."""
    return is_filled_with(c, 0)


def is_whole(x, y):
    """The result has the shape of the operand."""
    return x.shape is not None and x.shape == y.shape


def nothing_is_repeated(x, times):
    """Each axis is repeated once, and none is added."""
    return x.rank == len(times) and all(t == 1 for t in times)


def nothing_is_padded(pad):
    """Each axis is padded by nothing."""
    return all(p == 0 for p in pad)


def dtype_is_kept(x, y):
    """The operand has the dtype already."""
    return x.dtype is not None and x.dtype == y.dtype


def lies_alike(x, y):
    """The copy lies in memory as its source does."""
    return x.lies_like(y)


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
    return Rule(name, match=match, when=when, requires=requires, replace=operand)


remove_neutral_ops = rule_pass(
    "remove_neutral_ops",
    [
        neutral("x * 1 -> x", product, constant_is_one, requires=(is_real,)),
        neutral("x / 1 -> x", quotient, constant_is_one, requires=(is_real,)),
        neutral("x ** 1 -> x", power, requires=(is_real,)),
        neutral("x - 0 -> x", difference, constant_is_zero, requires=(is_real, keeps_the_sign_of_zero)),
        neutral("x + 0 -> x", sum_with_constant, constant_is_zero, requires=(is_real, keeps_the_sign_of_zero)),
        neutral("cat([x]) -> x", cat_of_one),
        neutral("clone(x) -> x", copy_alike, lies_alike),
        neutral("slice(x) -> x", part_or_expansion, is_whole),
        neutral("repeat(x, 1) -> x", repetition, nothing_is_repeated),
        neutral("pad(x, 0) -> x", padding, nothing_is_padded),
        neutral("to(x, its dtype) -> x", cast, dtype_is_kept),
        *(neutral(f"{name}({name}(x)) -> x", twice(name)) for name in ("neg", "logical_not", "bitwise_not")),
        *(Rule(f"{name}({name}(x)) -> {name}(x)", match=twice(name), replace=first_result)
          for name in ("relu", "abs", "ceil", "floor", "trunc", "sign", "round")),
        Rule("clamp(clamp(x)) -> clamp(x)", match=clamp_twice, replace=first_result),
        Rule("hardtanh(hardtanh(x)) -> hardtanh(x)", match=hardtanh_twice, replace=first_result),
    ],
    declares="exact",
    doc=__doc__,
)  # fmt: skip
