"""Fuse a convolution or linear with the residual addition and the activation that follow it.

    act(conv(x, w, b))          ->  conv_act(x, w, b, act)
    act(conv(x, w, b) + r)      ->  conv_act(x, w, b, residual=r, act)         r of the result's shape
    act(linear(x, w, b))        ->  linear_act(x, w, b, act)
    act(linear(x, w, b) + r)    ->  linear_act(x, w, b, residual=r, act)
    conv(x, w, b) + r           ->  conv_act(x, w, b, residual=r)              r added by no activation
    r + conv(x, w, b)           ->  the same, where the sum keeps its memory layout

act: relu, hardtanh (relu6), leaky_relu, hardswish, silu, sigmoid, tanh, gelu. The fused ops are of the dialect; lowering
turns them into oneDNN's fused kernels, or back into the ATen ops they stand for.
"""

from ir_tools.ir.facts import fact
from ir_tools.rewrite import Rule, Value, rule_pass
from ir_tools.rewrite.rule import unwrap

ACTIVATIONS = ("relu", "hardtanh", "leaky_relu", "hardswish", "silu", "sigmoid", "tanh", "gelu")


def activated(op, name, operand):
    return getattr(op, name)(operand, ..., name="act")


def conv_then(name):
    def conv_then_activation(op, x: Value, w: Value, b: Value | None):
        return activated(op, name, op.conv(x, w, b, ..., name="conv"))

    return conv_then_activation


def sum_then(name):
    def sum_then_activation(op, x: Value, w: Value, b: Value | None, stride: list, padding: list, dilation: list,
                            groups: int, r: Value):  # fmt: skip
        return activated(op, name, op.conv_act(x, w, b, stride, padding, dilation, groups, r, "", ..., name="sum"))

    return sum_then_activation


def conv_plus_residual(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(op.conv(x, w, b, ..., name="y"), r, ..., name="add")


def residual_plus_conv(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(r, op.conv(x, w, b, ..., name="y"), ..., name="add")


def linear_then(name):
    def linear_then_activation(op, x: Value, w: Value, b: Value | None):
        return activated(op, name, op.linear(x, w, b, name="linear"))

    return linear_then_activation


def linear_sum_then(name):
    def linear_sum_then_activation(op, x: Value, w: Value, b: Value | None, r: Value):
        return activated(op, name, op.linear_act(x, w, b, r, "", ..., name="sum"))

    return linear_sum_then_activation


def linear_plus_residual(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(op.linear(x, w, b, name="y"), r, ..., name="add")


def residual_plus_linear(op, x: Value, w: Value, b: Value | None, r: Value):
    return op.add(r, op.linear(x, w, b, name="y"), ..., name="add")


def summands_are_alike(add, y, r):
    """The two summands have the shape and dtype of the sum (nothing is broadcast or promoted)."""
    if None in (add.shape, y.shape, r.shape):
        return None
    return add.shape == y.shape == r.shape and add.dtype == y.dtype == r.dtype


def summands_are_not_scaled(add):
    """The addition has alpha = 1."""
    return add.alpha == 1


def the_sum_keeps_its_layout(add, y, r):
    """The sum has the same memory layout with the summands exchanged (later sums add in the order of memory)."""
    kept, first, second = (fact(unwrap(value)) for value in (add, y, r))
    if None in (kept, first, second):
        return None
    return (first + second).stride() == kept.stride()


def arguments_of(act):
    """The activation's name in the dialect and its plain arguments."""
    name = act.target.overloadpacket.__name__
    if name == "gelu":
        return ("gelu_tanh" if act.approximate == "tanh" else "gelu"), []
    values = {"hardtanh": ("min_val", "max_val"), "leaky_relu": ("negative_slope",)}.get(name, ())
    return name, [float(getattr(act, v)) for v in values]


def conv_with_activation(op, conv, act, x, w, b):
    name, values = arguments_of(act)
    return op.conv_act(x, w, b, conv.stride, conv.padding, conv.dilation, conv.groups, None, name, values)


def sum_with_activation(op, act, x, w, b, stride, padding, dilation, groups, r):
    name, values = arguments_of(act)
    return op.conv_act(x, w, b, stride, padding, dilation, groups, r, name, values)


def conv_with_residual(op, y, x, w, b, r):
    return op.conv_act(x, w, b, y.stride, y.padding, y.dilation, y.groups, r, "", [])


def linear_with_activation(op, act, x, w, b):
    return op.linear_act(x, w, b, None, *arguments_of(act))


def linear_sum_with_activation(op, act, x, w, b, r):
    return op.linear_act(x, w, b, r, *arguments_of(act))


def linear_with_residual(op, x, w, b, r):
    return op.linear_act(x, w, b, r, "", [])


SUM = (summands_are_alike, summands_are_not_scaled)
EXCHANGED = (*SUM, the_sum_keeps_its_layout)

fuse_conv_relu = rule_pass(
    "fuse_conv_relu",
    [
        *[Rule(f"{a}(conv(x)) -> conv_act(x)", match=conv_then(a), replace=conv_with_activation) for a in ACTIVATIONS],
        *[Rule(f"{a}(linear(x)) -> linear_act(x)", match=linear_then(a), replace=linear_with_activation)
          for a in ACTIVATIONS],
        Rule("conv(x) + r -> conv_act(x, r)", match=conv_plus_residual, requires=SUM, replace=conv_with_residual),
        Rule("r + conv(x) -> conv_act(x, r)", match=residual_plus_conv, requires=EXCHANGED, replace=conv_with_residual),
        Rule("linear(x) + r -> linear_act(x, r)", match=linear_plus_residual, requires=SUM, replace=linear_with_residual),
        Rule("r + linear(x) -> linear_act(x, r)", match=residual_plus_linear, requires=EXCHANGED, replace=linear_with_residual),
        *[Rule(f"{a}(conv_act(x, r)) -> conv_act(x, r)", match=sum_then(a), replace=sum_with_activation)
          for a in ACTIVATIONS],
        *[Rule(f"{a}(linear_act(x, r)) -> linear_act(x, r)", match=linear_sum_then(a), replace=linear_sum_with_activation)
          for a in ACTIVATIONS],
    ],
    declares="exact",
    doc=__doc__,
)  # fmt: skip
