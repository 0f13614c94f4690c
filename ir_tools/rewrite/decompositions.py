"""The dialect's own ops in the plain ATen ops they stand for.

    conv_act(x, w, b, residual, act)      ->  act(conv(x, w, b) + residual)
    linear_act(x, w, b, residual, act)    ->  act(linear(x, w, b) + residual)
    quant_stub(x)                         ->  x

`op` is the builder of a right side (`ir_tools.rewrite.build.Ops`), or anything else with its `call`.
"""

from ir_tools.ir.dialect import ACTIVATIONS, aten, conv_act, linear_act, quant_stub

CONVOLUTIONS = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
"""By the rank of the weight."""


def plain_conv(op, fused):
    conv = CONVOLUTIONS[fused.w.rank]
    y = op.call(conv, fused.x, fused.w, fused.b, fused.stride, fused.padding, fused.dilation, fused.groups)
    return finished(op, fused, y)


def plain_linear(op, fused):
    return finished(op, fused, op.call(aten.linear.default, fused.x, fused.w, fused.b))


def finished(op, fused, y):
    """`act(y + residual)`."""
    if fused.residual is not None:
        y = op.call(aten.add.Tensor, y, fused.residual)
    return activated(op, y, fused.act, fused.act_args)


def activated(op, y, act, act_args):
    """`act(y)`; the empty name is the identity."""
    if act == "":
        return y
    if act == "gelu_tanh":
        return op.call(aten.gelu.default, y, approximate="tanh")
    activation, _ = ACTIVATIONS[act]
    return op.call(activation, y, *act_args)


def without_stub(op, stub):
    return stub.x


DECOMPOSITIONS = {conv_act: plain_conv, linear_act: plain_linear, quant_stub: without_stub}
