"""Fold a frozen batch norm into the convolution or linear that feeds it.

    batch_norm(conv(x, w, b), gamma, beta, mean, var)  ->  conv(x, w', b')

        s = gamma / sqrt(var + eps),   w' = w * s,   b' = (b - mean) * s + beta      in float64, then back to w's dtype

`s` scales the output channels: the first axis of a convolution's or linear's weight, the second of a transposed
convolution's, group by group. Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1 (inference).
"""

import torch
from torch import Tensor

from ir_tools.rewrite import Rule, Value, rule_pass


def conv_then_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                         mean: Tensor | None, var: Tensor | None):  # fmt: skip
    conv = op.conv(x, w, b, ..., name="conv")
    return op.batch_norm(conv, gamma, beta, mean, var, ..., name="bn")


def conv_transpose_then_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None,
                                   beta: Tensor | None, mean: Tensor | None, var: Tensor | None):  # fmt: skip
    conv = op.conv_transpose(x, w, b, ..., name="conv")
    return op.batch_norm(conv, gamma, beta, mean, var, ..., name="bn")


def linear_then_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                           mean: Tensor | None, var: Tensor | None):  # fmt: skip
    linear = op.linear(x, w, b, name="linear")
    return op.batch_norm(linear, gamma, beta, mean, var, ..., name="bn")


def batch_norm_is_frozen(bn):
    """The batch norm uses its stored statistics, not those of the batch."""
    return not bn.training


def input_is_batched(x, w):
    """The convolution's input has a batch axis, so that its channels are the axis that the batch norm normalises."""
    return None if x.rank is None else x.rank == w.dim()


def channels_are_last(linear):
    """The linear's result has two axes, so that its features are the axis that the batch norm normalises."""
    return None if linear.rank is None else linear.rank == 2


def folded_conv(op, conv, bn, x, w, b, gamma, beta, mean, var):
    s, shift = scale_and_shift(b, gamma, beta, mean, var, bn.eps)
    return op.like(conv, x, scaled(w, s, axis=0), shift.to(w.dtype))


def folded_conv_transpose(op, conv, bn, x, w, b, gamma, beta, mean, var):
    s, shift = scale_and_shift(b, gamma, beta, mean, var, bn.eps)
    groups = w.double().unflatten(0, (conv.groups, -1))  # groups, in / groups, out / groups, kernel
    by_group = s.reshape(conv.groups, 1, -1, *[1] * (w.dim() - 2))
    return op.like(conv, x, (groups * by_group).flatten(0, 1).to(w.dtype), shift.to(w.dtype))


def folded_linear(op, linear, bn, x, w, b, gamma, beta, mean, var):
    s, shift = scale_and_shift(b, gamma, beta, mean, var, bn.eps)
    return op.like(linear, x, scaled(w, s, axis=0), shift.to(w.dtype))


def scale_and_shift(b, gamma, beta, mean, var, eps):
    """`s` and `b'` of the equation, in float64. A missing bias or shift is 0, a missing gamma 1."""
    s = 1 / torch.sqrt(var.double() + eps)
    s = s if gamma is None else gamma.double() * s
    shift = ((0 if b is None else b.double()) - mean.double()) * s
    return s, shift if beta is None else shift + beta.double()


def scaled(w, s, axis):
    """`w` with its output channels scaled by `s`, rounded once; its memory layout is kept."""
    by_channel = [1] * w.dim()
    by_channel[axis] = -1
    out = torch.empty_like(w)
    return out.copy_(w.double() * s.reshape(by_channel))


fuse_conv_bn = rule_pass(
    "fuse_conv_bn",
    [
        Rule("batch_norm(conv(x)) -> conv(x)",
             match=conv_then_batch_norm, requires=(batch_norm_is_frozen, input_is_batched), replace=folded_conv),
        Rule("batch_norm(conv_transpose(x)) -> conv_transpose(x)",
             match=conv_transpose_then_batch_norm, requires=(batch_norm_is_frozen, input_is_batched),
             replace=folded_conv_transpose),
        Rule("batch_norm(linear(x)) -> linear(x)",
             match=linear_then_batch_norm, requires=(batch_norm_is_frozen, channels_are_last), replace=folded_linear),
    ],
    declares="reassociates",
    doc=__doc__,
)  # fmt: skip
