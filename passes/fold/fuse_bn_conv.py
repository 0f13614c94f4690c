"""Fold a frozen batch norm into the convolution or linear that reads it.

    layer(batch_norm(x, gamma, beta, mean, var), w, b)  ->  layer(x, w', b')

        s = gamma / sqrt(var + eps),   t = beta - mean * s
        w' = w * s over input channels,   b' = b + sum of w * t over input channels and kernel      in float64

layer: convolutions without padding (zeros that are padded behind the batch norm are not shifted by it), linears of two axes,
transposed convolutions of kernel and stride 1.
"""

from torch import Tensor

from ir_tools.rewrite import Rule, Value, rule_pass
from passes.fold.arithmetic import (
    LARGE_SHIFT,
    batch_norm_as_affine,
    every_output_sees_a_whole_window,
    is_large_shift,
    layer_sum,
    normalises_channels,
    refolded,
    scaled_inputs,
)
from passes.fold.fuse_conv_bn import batch_norm_is_frozen


def layer_of_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                        mean: Tensor | None, var: Tensor | None):  # fmt: skip
    bn = op.batch_norm(x, gamma, beta, mean, var, ..., name="bn")
    return op.layer(bn, w, b, ..., name="layer")


def inputs_are_normalised(layer, x, w):
    """The axis that the batch norm normalises holds the layer's input channels (convolutions batched, linears of two axes)."""
    return normalises_channels(layer, x, w)


def nothing_is_padded(layer, w):
    """The layer pads nothing, so that every output sees a whole window of its input."""
    return every_output_sees_a_whole_window(layer, w)


def folded_forward(op, layer, bn, x, w, b, gamma, beta, mean, var):
    s, t = batch_norm_as_affine(gamma, beta, mean, var, bn.eps)
    if is_large_shift(t, w):
        return op.decline(LARGE_SHIFT)
    shift = layer_sum(layer, w, t)
    return refolded(op, layer, x, w, scaled_inputs(layer, w, s), shift if b is None else b.double() + shift)


fuse_bn_conv = rule_pass(
    "fuse_bn_conv",
    [
        Rule("layer(batch_norm(x)) -> layer(x)", match=layer_of_batch_norm,
             requires=(batch_norm_is_frozen, inputs_are_normalised, nothing_is_padded), replace=folded_forward),
    ],
    effects={"rounds"},
    doc=__doc__,
)  # fmt: skip
