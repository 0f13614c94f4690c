"""Merge two linear layers with nothing between them into one, where that saves work.

    linear(linear(x, w1, b1), w2, b2)   ->  linear(x, w2 w1, w2 b1 + b2)
    conv1x1(conv(x, w1, b1), w2, b2)    ->  conv(x, w2 w1, w2 b1 + b2)           the 1x1 of stride 1, unpadded
    conv(conv1x1(x, w1, b1), w2, b2)    ->  conv(x, w2 w1, sum(w2) b1 + b2)      the second unpadded, or b1 missing

in float64, then back to the dtype of the weights; neither is grouped. Saves work: the merged weight has fewer elements than
the two together, each of which is one multiplication per output position; a bottleneck (the two factors of a low-rank weight)
stays as it is.
"""

import torch
from torch import Tensor

from ir_tools.rewrite import Rule, Value, rule_pass
from passes.fold.arithmetic import layer_sum, refolded


def linear_of_linear(op, x: Value, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None):
    return op.linear(op.linear(x, w1, b1, name="first"), w2, b2, name="second")


def pointwise_of_conv(op, x: Value, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None):
    return op.conv(op.conv(x, w1, b1, ..., name="first"), w2, b2, ..., name="second")


def conv_of_pointwise(op, x: Value, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None):
    return op.conv(op.conv(x, w1, b1, ..., name="first"), w2, b2, ..., name="second")


def neither_is_grouped(first, second):
    """Neither convolution is grouped."""
    return first.groups == second.groups == 1


def the_second_is_pointwise(second, w2):
    """The second convolution is 1x1, of stride 1, and pads nothing."""
    return is_pointwise(second, w2)


def the_first_is_pointwise(first, w1):
    """The first convolution is 1x1, of stride 1, and pads nothing."""
    return is_pointwise(first, w1)


def no_bias_is_padded_over(second, b1):
    """The second convolution pads nothing, or the first has no bias (what is padded is zero, not that bias)."""
    return b1 is None or not any(second.padding)


def is_pointwise(conv, w):
    return all(size == 1 for size in (*w.shape[2:], *conv.stride)) and not any(conv.padding)


def it_saves_work(w1, w2):
    """The merged weight has fewer elements than the two together."""
    kernel = w1[0, 0].numel() * w2[0, 0].numel()
    return w2.shape[0] * w1.shape[1] * kernel < w1.numel() + w2.numel()


def merged_linear(op, first, second, x, w1, b1, w2, b2):
    return refolded(op, first, x, w1, w2.double() @ w1.double(), bias(second, w2, b1, b2))


def merged_into_first(op, first, second, x, w1, b1, w2, b2):
    w = torch.einsum("om,mi...->oi...", w2.double().flatten(1), w1.double())
    return refolded(op, first, x, w1, w, bias(second, w2, b1, b2))


def merged_into_second(op, second, x, w1, b1, w2, b2):
    w = torch.einsum("om...,mi->oi...", w2.double(), w1.double().flatten(1))
    return refolded(op, second, x, w2, w, bias(second, w2, b1, b2))


def bias(second, w2, b1, b2):
    """The second layer applied to the first one's bias, plus its own; None where there is neither."""
    parts = [*([] if b1 is None else [layer_sum(second, w2, b1.double())]), *([] if b2 is None else [b2.double()])]
    return sum(parts) if parts else None


merge_linear_chains = rule_pass(
    "merge_linear_chains",
    [
        Rule("linear(linear(x)) -> linear(x)", match=linear_of_linear, requires=(it_saves_work,),
             replace=merged_linear),
        Rule("conv1x1(conv(x)) -> conv(x)", match=pointwise_of_conv,
             requires=(neither_is_grouped, the_second_is_pointwise, it_saves_work), replace=merged_into_first),
        Rule("conv(conv1x1(x)) -> conv(x)", match=conv_of_pointwise,
             requires=(neither_is_grouped, the_first_is_pointwise, no_bias_is_padded_over, it_saves_work),
             replace=merged_into_second),
    ],
    effects={"rounds"},
    doc=__doc__,
)  # fmt: skip
