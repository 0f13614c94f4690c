"""Fold constants that scale or shift the result of a convolution or linear into its weight and bias.

    layer(x, w, b) * c   ->  layer(x, w * c, b * c)          c: one number, or one per output channel; either order
    layer(x, w, b) / c   ->  layer(x, w / c, b / c)
    layer(x, w, b) + c   ->  layer(x, w, b + c)              either order
    layer(x, w, b) - c   ->  layer(x, w, b - c)
    c - layer(x, w, b)   ->  layer(x, -w, c - b)
    -layer(x, w, b)      ->  layer(x, -w, -b)
    batch_norm(layer)    ->  as in fuse_conv_bn: chains fold in whatever order they come

in float64, then back to w's dtype. What torchvision's FrozenBatchNorm2d computes is such a chain.
"""

from functools import partial

from torch import Tensor

from ir_tools.rewrite import Known, Rule, Value, rule_pass
from passes.fold.affine import right_side
from passes.fold.arithmetic import channel_axis, is_per_channel, output_channels, per_channel, refolded, scaled_outputs
from passes.fold.fuse_conv_bn import RULES as BATCH_NORMS


def layer_times_constant(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.mul(op.layer(x, w, b, ..., name="layer"), c, name="step")


def layer_over_constant(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.div(op.layer(x, w, b, ..., name="layer"), c, rounding_mode=None, name="step")


def layer_plus_constant(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.add(op.layer(x, w, b, ..., name="layer"), c, ..., name="step")


def layer_minus_constant(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    return op.sub(op.layer(x, w, b, ..., name="layer"), c, ..., name="step")


def constant_minus_layer(op, x: Value, w: Tensor, b: Tensor | None, c: Known | float):
    layer = op.layer(x, w, b, ..., name="layer")
    return op.one_of(op.sub(c, layer, ..., name="step"), op.rsub(layer, c, ..., name="step"))


def negated_layer(op, x: Value, w: Tensor, b: Tensor | None):
    return op.neg(op.layer(x, w, b, ..., name="layer"))


def the_constant_is_per_output_channel(layer, w, c):
    """The constant is one number, or one number per output channel."""
    return is_per_channel(c, output_channels(layer, w), channel_axis(w))


def affine(op, layer, x, w, b, scale, shift):
    """`scale * layer(x, w, b) + shift`; a layer without bias gets one only from a shift."""
    channels = output_channels(layer, w)
    s = per_channel(1.0 if scale is None else scale, channels, w)
    bias = b if b is None else b.double() * s
    if shift is not None:
        bias = per_channel(shift, channels, w) + (0 if bias is None else bias)
    return refolded(op, layer, x, w, scaled_outputs(layer, w, s), bias)


folded = partial(right_side, affine, output_channels)
PER_CHANNEL = (the_constant_is_per_output_channel,)

fold_affine = rule_pass(
    "fold_affine",
    [
        Rule("layer(x) * c -> layer(x)", match=layer_times_constant, requires=PER_CHANNEL, replace=folded("y * c")),
        Rule("layer(x) / c -> layer(x)", match=layer_over_constant, requires=PER_CHANNEL, replace=folded("y / c")),
        Rule("layer(x) + c -> layer(x)", match=layer_plus_constant, requires=PER_CHANNEL, replace=folded("y + c")),
        Rule("layer(x) - c -> layer(x)", match=layer_minus_constant, requires=PER_CHANNEL, replace=folded("y - c")),
        Rule("c - layer(x) -> layer(x)", match=constant_minus_layer, requires=PER_CHANNEL, replace=folded("c - y")),
        Rule("-layer(x) -> layer(x)", match=negated_layer, replace=folded("-y")),
        *BATCH_NORMS,
    ],
    effects={"rounds"},
    doc=__doc__,
)
