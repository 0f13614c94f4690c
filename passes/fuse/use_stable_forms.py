"""Use the stable forms, which neither overflow nor cancel.

    log(softmax(x, d))                              ->  log_softmax(x, d)
    exp(x) / sum(exp(x), d, keepdim=True)           ->  softmax(x, d)
    softmax(x - max(x, d, keepdim=True), d)         ->  softmax(x, d)        max: amax, or the values of max
    log(sum(exp(x), d, keepdim))                    ->  logsumexp(x, d, keepdim)
    log(1 + x)                                      ->  log1p(x)
    exp(x) - 1                                      ->  expm1(x)
    log(sigmoid(x))                                 ->  log_sigmoid(x)

Identities over the reals. In floats the left sides fail where exp overflows (x > 88 in float32: Inf, or NaN as Inf / Inf),
where a softmax or sigmoid underflows to 0 (its log is -Inf), and where 1 + x or exp(x) - 1 cancels (x near 0: few bits are
left); elsewhere both sides agree to rounding. What was NaN or Inf may become finite: the pass declares that effect.

x is of a floating dtype. A model that relied on the failure (a test for Inf, say) gives other answers; none of this is default.
Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., 2002, sections 1.14 and 27.8 (Inf, NaN); Blanchard,
Higham and Higham, "Accurately computing the log-sum-exp and softmax functions", 2021.
"""

import torch

from ir_tools.rewrite import Rule, Value, rule_pass


def log_of_softmax(op, x: Value, axis: int, cast: torch.dtype | None):
    return op.log(op.softmax(x, axis, cast))


def softmax_by_hand(op, x: Value, axes: list):
    return op.div(op.exp(x), op.sum(op.exp(x), axes, True, dtype=None), rounding_mode=None)


def softmax_below_the_largest(op, x: Value, axis: int, cast: torch.dtype | None, axes: list, along: int):
    largest = op.one_of(op.amax(x, axes, True, name="amax"), op.getitem(op.max(x, along, True), 0))
    return op.softmax(op.sub(x, largest, alpha=1), axis, cast)


def log_of_sum_of_exp(op, x: Value, axes: list, keep: bool):
    return op.log(op.sum(op.exp(x), axes, keep, dtype=None))


def log_of_one_more(op, x: Value):
    return op.log(op.add(x, 1, alpha=1))


def one_less_than_exp(op, x: Value):
    return op.sub(op.exp(x), 1, alpha=1)


def log_of_sigmoid(op, x: Value):
    return op.log(op.sigmoid(x))


def operand_is_floating(x):
    """The operand is of a floating dtype."""
    return None if x.dtype is None else x.dtype.is_floating_point


def sum_is_over_one_axis(axes):
    """The sum goes over one axis."""
    return len(axes) == 1


def sum_names_its_axes(axes):
    """The sum names the axes that it goes over."""
    return len(axes) > 0


def largest_is_of_the_same_axis(x, axis, axes, along):
    """The largest value is taken over the axis of the softmax."""
    if x.rank is None:
        return None
    over = [along] if axes is None else axes
    return len(over) == 1 and over[0] % x.rank == axis % x.rank


def log_softmax(op, x, axis, cast):
    return op.log_softmax(x, axis, cast)


def softmax_over_axes(op, x, axes):
    return op.softmax(x, axes[0], None)


def softmax(op, x, axis, cast):
    return op.softmax(x, axis, cast)


def logsumexp(op, x, axes, keep):
    return op.logsumexp(x, axes, keep)


def log1p(op, x):
    return op.log1p(x)


def expm1(op, x):
    return op.expm1(x)


def log_sigmoid(op, x):
    return op.log_sigmoid(x)


def stable(name, match, replace, *requires):
    return Rule(name, match=match, requires=(operand_is_floating, *requires), replace=replace)


use_stable_forms = rule_pass(
    "use_stable_forms",
    [
        stable("exp(x) / sum(exp(x)) -> softmax(x)", softmax_by_hand, softmax_over_axes, sum_is_over_one_axis),
        stable("softmax(x - max(x)) -> softmax(x)", softmax_below_the_largest, softmax, largest_is_of_the_same_axis),
        stable("log(softmax(x)) -> log_softmax(x)", log_of_softmax, log_softmax),
        stable("log(sum(exp(x))) -> logsumexp(x)", log_of_sum_of_exp, logsumexp, sum_names_its_axes),
        stable("log(1 + x) -> log1p(x)", log_of_one_more, log1p),
        stable("exp(x) - 1 -> expm1(x)", one_less_than_exp, expm1),
        stable("log(sigmoid(x)) -> log_sigmoid(x)", log_of_sigmoid, log_sigmoid),
    ],
    effects={"rounds", "non_finite_may_become_finite"},
    doc=__doc__,
)
