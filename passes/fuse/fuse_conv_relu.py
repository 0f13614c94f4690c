"""Fuse a convolution or linear with the residual addition and the activation that follow it.

    act(conv(x, w, b))          ->  conv_act(x, w, b, act)
    conv(x, w, b) + r           ->  conv_act(x, w, b, residual=r)              r of the result's shape, in either order
    act(conv(x, w, b) + r)      ->  conv_act(x, w, b, residual=r, act)
    linear                          the same, as linear_act

act: relu, hardtanh (relu6), leaky_relu, hardswish, hardsigmoid, silu, sigmoid, tanh, gelu, elu. The fused ops are of the
dialect; lowering turns them into oneDNN's fused kernels, or back into the ATen ops they stand for.
"""

from ir_tools.ir.dialect import ACTIVATIONS
from ir_tools.rewrite import Rule, Value, rule_pass


def conv_then_activation(op, x: Value, w: Value, b: Value | None):
    return op.activation(op.conv(x, w, b, ..., name="conv"), ..., name="act")


def conv_plus_residual(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(op.conv(x, w, b, ..., name="y"), r, ..., name="add")


def conv_sum_then_activation(op, x: Value, w: Value, b: Value | None, r: Value):
    sum = op.conv_act(x, w, b, residual=r, act="", name="sum")
    return op.activation(sum, ..., name="act")


def linear_then_activation(op, x: Value, w: Value, b: Value | None):
    return op.activation(op.linear(x, w, b), ..., name="act")


def linear_plus_residual(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(op.linear(x, w, b, name="y"), r, ..., name="add")


def linear_sum_then_activation(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.activation(op.linear_act(x, w, b, r, "", ...), ..., name="act")


def summands_are_alike(add, y, r):
    """The two summands have the shape and dtype of the sum (nothing is broadcast or promoted)."""
    if None in (add.shape, y.shape, r.shape):
        return None
    return add.shape == y.shape == r.shape and add.dtype == y.dtype == r.dtype


def summands_are_not_scaled(add):
    """The addition has alpha = 1."""
    return add.alpha == 1


def arguments_of(act):
    """The activation's name in the dialect and its plain arguments."""
    name = act.target.overloadpacket.__name__
    if name == "gelu":
        return ("gelu_tanh" if act.approximate == "tanh" else "gelu"), []
    return name, [getattr(act, argument) for argument in ACTIVATIONS[name][1]]


def conv_with_activation(op, conv, act, x, w, b):
    return op.conv_act(x, w, b, conv.stride, conv.padding, conv.dilation, conv.groups, None, *arguments_of(act))


def conv_with_residual(op, y, x, w, b, r):
    return op.conv_act(x, w, b, y.stride, y.padding, y.dilation, y.groups, r, "", [])


def conv_sum_with_activation(op, sum, act, x, w, b, r):
    return op.conv_act(x, w, b, sum.stride, sum.padding, sum.dilation, sum.groups, r, *arguments_of(act))


def linear_with_activation(op, act, x, w, b):
    return op.linear_act(x, w, b, None, *arguments_of(act))


def linear_with_residual(op, x, w, b, r):
    return op.linear_act(x, w, b, r, "", [])


def linear_sum_with_activation(op, act, x, w, b, r):
    return op.linear_act(x, w, b, r, *arguments_of(act))


SUM = (summands_are_alike, summands_are_not_scaled)

fuse_conv_relu = rule_pass(
    "fuse_conv_relu",
    [
        Rule("act(conv(x)) -> conv_act(x)", match=conv_then_activation, replace=conv_with_activation),
        Rule("act(linear(x)) -> linear_act(x)", match=linear_then_activation, replace=linear_with_activation),
        Rule("conv(x) + r -> conv_act(x, r)", match=conv_plus_residual, requires=SUM, replace=conv_with_residual),
        Rule("linear(x) + r -> linear_act(x, r)", match=linear_plus_residual, requires=SUM, replace=linear_with_residual),
        Rule("act(conv_act(x, r)) -> conv_act(x, r)", match=conv_sum_then_activation, replace=conv_sum_with_activation),
        Rule("act(linear_act(x, r)) -> linear_act(x, r)",
             match=linear_sum_then_activation, replace=linear_sum_with_activation),
    ],
    effects=(),
    doc=__doc__,
)  # fmt: skip
