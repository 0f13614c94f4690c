"""Fold a frozen batch norm into the convolution or linear that feeds it.

    batch_norm(layer(x, w, b), gamma, beta, mean, var)  ->  layer(x, w', b')

        s = gamma / sqrt(var + eps),   w' = w * s,   b' = (b - mean) * s + beta      in float64, then back to w's dtype

    batch_norm(move(linear(x, w, b)), ...)              ->  move(linear(x, w', b'))

move: transpose or permute, of the last axis to the second; or a reshape of all axes but the last into one.

layer: conv1d/2d/3d, conv_transpose1d/2d/3d (grouped or not), linear of two axes. `s` scales the output channels: the first axis
of a convolution's or linear's weight, the second of a transposed convolution's, group by group.
"""

from torch import Tensor

from ir_tools.ir.dialect import RESHAPINGS
from ir_tools.rewrite import Rule, Value, rule_pass
from passes.fold.arithmetic import batch_norm_as_affine, normalises_channels, refolded, scaled_outputs


def layer_then_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                          mean: Tensor | None, var: Tensor | None):  # fmt: skip
    layer = op.layer(x, w, b, ..., name="layer")
    return op.batch_norm(layer, gamma, beta, mean, var, ..., name="bn")


def moved_linear_then_batch_norm(op, x: Value, w: Tensor, b: Tensor | None, gamma: Tensor | None, beta: Tensor | None,
                                 mean: Tensor | None, var: Tensor | None):  # fmt: skip
    linear = op.linear(x, w, b, name="layer")
    moved = op.one_of(op.permutation(linear, ..., name="moved"), op.reshaping(linear, ..., name="moved"))
    return op.batch_norm(moved, gamma, beta, mean, var, ..., name="bn")


def batch_norm_is_frozen(bn):
    """The batch norm uses its stored statistics, not those of the batch."""
    return not bn.training


def channels_are_normalised(layer, w):
    """The layer's channels are the axis that the batch norm normalises (convolutions batched, linears of two axes)."""
    return normalises_channels(layer, layer, w)


def features_become_the_second_axis(layer, moved):
    """The features of the linear are moved from its last axis to the second, which the batch norm normalises."""
    if layer.rank is None or moved.rank is None:
        return None
    if moved.target in RESHAPINGS:
        return moved.rank == 2 and moved.shape[1] == layer.shape[-1]
    order = moved.axis_order
    return order is not None and len(order) > 1 and order[1] == layer.rank - 1


def folded(op, layer, bn, x, w, b, gamma, beta, mean, var):
    s, t = batch_norm_as_affine(gamma, beta, mean, var, bn.eps)
    return refolded(op, layer, x, w, scaled_outputs(layer, w, s), t if b is None else b.double() * s + t)


def folded_and_moved(op, layer, moved, bn, x, w, b, gamma, beta, mean, var):
    linear = folded(op, layer, bn, x, w, b, gamma, beta, mean, var)
    return linear and op.like(moved, linear)


RULES = (
    Rule("batch_norm(layer(x)) -> layer(x)", match=layer_then_batch_norm,
         requires=(batch_norm_is_frozen, channels_are_normalised), replace=folded),
    Rule("batch_norm(move(linear(x))) -> move(linear(x))", match=moved_linear_then_batch_norm,
         requires=(batch_norm_is_frozen, features_become_the_second_axis), replace=folded_and_moved),
)  # fmt: skip

fuse_conv_bn = rule_pass("fuse_conv_bn", RULES, effects={"rounds"}, doc=__doc__)
