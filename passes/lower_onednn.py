"""Lower convolutions and linears to oneDNN's fused kernels, with weights packed when the file is loaded.

    conv_act(x, w, b, act)               ->  mkldnn::_convolution_pointwise(x, pack(w), b, act)
    conv_act(x, w, b, r, act in {, relu})->  mkldnn::_convolution_pointwise.binary(x, r, pack(w), b, "add", act)
    linear_act(x, w, b, act)             ->  mkldnn::_linear_pointwise(x, pack(w), b, act)
    linear_act(x, w, b, r)               ->  mkldnn::_linear_pointwise.binary(x, r, pack(w), b, "add")
    conv2d, conv3d, linear               ->  the same without activation
    everything else of the dialect       ->  as in lower_aten

A sum with a residual that nobody reads afterwards is written into the residual's memory. A packed convolution gives
channels-last results, and the ops between convolutions keep that layout, so it holds throughout. oneDNN's fused relu
and hardtanh give a number for NaN, where ATen gives NaN.
"""

import math
from typing import Any

import torch

from ir_tools.ir.dialect import aten, conv_act, linear_act, quant_stub
from ir_tools.ir.program import Packing
from ir_tools.rewrite import table_pass
from passes.lower_aten import activated, plain_conv, plain_linear, without_stub

ONEDNN_NAME = {"": "none", "silu": "swish", "gelu_tanh": "gelu"}
"""Activation names of oneDNN where they differ from the dialect's."""

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SUPPORTED = (torch.float32, torch.bfloat16)
LINEARS = (linear_act, aten.linear.default)
mkldnn = torch.ops.mkldnn

ALGORITHM = {"gelu": "none", "gelu_tanh": "tanh"}
UNKNOWN_TO_ONEDNN = ("elu",)
"""Activations that torch's oneDNN kernels refuse ("Fusion behavior undefined"): they follow as ops of their own."""
WITH_RESIDUAL = ("", "relu")
"""The only activations that oneDNN's kernels take after the sum with a residual."""


def packed_conv(op, conv):
    if why_not := objection(conv, conv.x, conv.w):
        op.decline(why_not)
        return plain_conv(op, conv)
    return fused_conv(op, conv, conv.x, conv.w, conv.b, conv.residual, conv.act, conv.act_args)


def packed_plain_conv(op, conv):
    if why_not := objection(conv, conv.input, conv.weight):
        return op.decline(why_not)
    return fused_conv(op, conv, conv.input, conv.weight, conv.bias, None, "", [])


def packed_linear(op, linear):
    if why_not := objection(linear, linear.x, linear.w):
        op.decline(why_not)
        return plain_linear(op, linear)
    return fused_linear(op, linear.x, linear.w, linear.b, linear.residual, linear.act, linear.act_args)


def packed_plain_linear(op, linear):
    if why_not := objection(linear, linear.input, linear.weight):
        return op.decline(why_not)
    return fused_linear(op, linear.input, linear.weight, linear.bias, None, "", [])


def objection(call, x, w):
    """Why oneDNN's kernel cannot take this op, None when it can."""
    if x.shape is None or w.shape is None:
        return "unknown, give example_inputs: shapes"
    if x.device.type != "cpu":
        return "oneDNN's kernels run on the CPU"
    if x.dtype not in SUPPORTED or w.dtype != x.dtype:
        return f"oneDNN's kernels here take float32 and bfloat16, not {x.dtype} with a weight of {w.dtype}"
    if not w.is_constant:
        return "the weight is not a constant, so it cannot be packed ahead of time"
    if 0 in x.shape or 0 in w.shape:
        return "an operand has no elements"
    if call.target not in LINEARS and (x.rank != w.rank or w.rank not in (4, 5)):
        return "oneDNN's packed convolution takes batched 2-d and 3-d inputs"
    return None


def fused_conv(op, conv, x, w, b, residual, act, act_args):
    sizes: Any = (conv.padding, conv.stride, conv.dilation)
    weight = op.packed(w, Packing("conv", conv.padding, conv.stride, conv.dilation, conv.groups, x.example_shape))
    if residual is None and act in UNKNOWN_TO_ONEDNN:
        y = fused_conv(op, conv, x, w, b, None, "", [])
        return activated(op, y, act, act_args)
    if residual is None:
        name, algorithm = ONEDNN_NAME.get(act, act), ALGORITHM.get(act)
        return op.call(mkldnn._convolution_pointwise.default, x, weight, b, *sizes, conv.groups, name, act_args, algorithm)
    inner, outer = (act, "") if act in WITH_RESIDUAL else ("", act)
    fused: tuple = (b, *sizes, conv.groups, "add", 1.0, inner or None, [], None)
    if residual.dies_at(conv):
        # In any other layout the kernel adds by itself, and knows no bfloat16 then. Free where the layout is right.
        residual = op.contiguous(residual, memory_format=CHANNELS_LAST[x.rank])
        y = op.call(mkldnn._convolution_pointwise_.binary, residual, x, weight, *fused)
    else:
        y = op.call(mkldnn._convolution_pointwise.binary, x, residual, weight, *fused)
    return activated(op, y, outer, act_args)


def fused_linear(op, x, w, b, residual, act, act_args):
    weight = op.packed(w, Packing("linear", batch=math.prod((x.example_shape or (1,))[:-1])))
    if residual is None and act in UNKNOWN_TO_ONEDNN:
        y = fused_linear(op, x, w, b, None, "", [])
        return activated(op, y, act, act_args)
    if residual is None:
        name, algorithm = ONEDNN_NAME.get(act, act), ALGORITHM.get(act)
        return op.call(mkldnn._linear_pointwise.default, x, weight, b, name, act_args, algorithm)
    y = op.call(mkldnn._linear_pointwise.binary, x, residual, weight, b, "add")
    return activated(op, y, act, act_args)


KERNELS = {
    conv_act: packed_conv,
    aten.conv2d.default: packed_plain_conv,
    aten.conv3d.default: packed_plain_conv,
    linear_act: packed_linear,
    aten.linear.default: packed_plain_linear,
    quant_stub: without_stub,
}

lower_onednn = table_pass("lower_onednn", KERNELS, declares="reassociates", doc=__doc__)
