"""Fold constants that scale or shift the input of a convolution or linear into its weight and bias.

    layer(x * c, w, b)   ->  layer(x, w * c, b)                   c: one number, or one per input channel; either order
    layer(x / c, w, b)   ->  layer(x, w / c, b)
    layer(x + c, w, b)   ->  layer(x, w, b + sum of w * c)        either order; the layer pads nothing
    layer(x - c, w, b)   ->  layer(x, w, b - sum of w * c)        the layer pads nothing
    layer(c - x, w, b)   ->  layer(x, -w, b + sum of w * c)       the layer pads nothing
    layer(-x, w, b)      ->  layer(x, -w, b)

in float64, then back to w's dtype; sums over input channels and kernel. Zeros that a layer pads stay zeros when they are
scaled, but a shift does not reach them; and one much larger than the input varies would cost digits. Input pictures that
`forward` normalises are such a chain.
"""

from functools import partial

from torch import Tensor

from ir_tools.rewrite import Known, Rule, Value, rule_pass
from passes.fold.affine import right_side
from passes.fold.arithmetic import (
    LARGE_SHIFT,
    channel_axis,
    input_channels,
    is_large_shift,
    is_per_channel,
    layer_sum,
    per_channel,
    refolded,
    scaled_inputs,
)
from passes.fold.fuse_bn_conv import nothing_is_padded


def layer_of_product(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.layer(op.mul(x, c, name="step"), w, b, ..., name="layer")


def layer_of_quotient(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.layer(op.div(x, c, rounding_mode=None, name="step"), w, b, ..., name="layer")


def layer_of_sum(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.layer(op.add(x, c, ..., name="step"), w, b, ..., name="layer")


def layer_of_difference(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.layer(op.sub(x, c, ..., name="step"), w, b, ..., name="layer")


def layer_of_complement(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    step = op.one_of(op.sub(c, x, ..., name="step"), op.rsub(x, c, ..., name="step"))
    return op.layer(step, w, b, ..., name="layer")


def layer_of_negation(op, x: Value, w: Tensor, b: Tensor | None):
    return op.layer(op.neg(x, name="step"), w, b, ..., name="layer")


def the_constant_is_per_input_channel(layer, w, c):
    """The constant is one number, or one number per input channel."""
    return is_per_channel(c, input_channels(layer, w), channel_axis(w))


def the_input_is_not_widened(step, x):
    """The layer's input has the shape and dtype of the value that is scaled or shifted."""
    if None in (step.shape, x.shape):
        return None
    return step.shape == x.shape and step.dtype == x.dtype


def affine(op, layer, x, w, b, scale, shift):
    """`layer(scale * x + shift, w, b)`; a layer without bias gets one only from a shift."""
    channels = input_channels(layer, w)
    weight = scaled_inputs(layer, w, per_channel(1.0 if scale is None else scale, channels, w))
    if shift is None:
        return refolded(op, layer, x, w, weight, b)
    t = per_channel(shift, channels, w)
    if is_large_shift(t, w):
        return op.decline(LARGE_SHIFT)
    added = layer_sum(layer, w, t)
    return refolded(op, layer, x, w, weight, added if b is None else b.double() + added)


folded = partial(right_side, affine, input_channels)
SCALED = (the_constant_is_per_input_channel, the_input_is_not_widened)
SHIFTED = (*SCALED, nothing_is_padded)

fold_input_affine = rule_pass(
    "fold_input_affine",
    [
        Rule("layer(x * c) -> layer(x)", match=layer_of_product, requires=SCALED, replace=folded("y * c")),
        Rule("layer(x / c) -> layer(x)", match=layer_of_quotient, requires=SCALED, replace=folded("y / c")),
        Rule("layer(x + c) -> layer(x)", match=layer_of_sum, requires=SHIFTED, replace=folded("y + c")),
        Rule("layer(x - c) -> layer(x)", match=layer_of_difference, requires=SHIFTED, replace=folded("y - c")),
        Rule("layer(c - x) -> layer(x)", match=layer_of_complement, requires=SHIFTED, replace=folded("c - y")),
        Rule("layer(-x) -> layer(x)", match=layer_of_negation, replace=folded("-y")),
    ],
    effects={"rounds"},
    doc=__doc__,
)
