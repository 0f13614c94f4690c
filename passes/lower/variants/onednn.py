"""The variants in which oneDNN can compute a layer:  act(f(x, w, b) + residual),  f a convolution or a linear.

    fused     one kernel                     mkldnn::_convolution_pointwise(x, pack(w), b, act)
    apart     packed f, then the rest        relu(mkldnn::_convolution_pointwise(x, pack(w), b, none) + residual)
    packed    the same, where there is nothing to fuse: no residual, and no activation that oneDNN knows
    plain     all in ATen                    relu(conv2d(x, w, b) + residual)
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ir_tools.ir.dialect import aten, conv_act, linear_act
from ir_tools.ir.facts import CHANNELS_LAST
from ir_tools.ir.prepack import prepack_conv, prepack_linear
from ir_tools.rewrite import Call, Value
from ir_tools.rewrite.decompositions import CONVOLUTIONS, activated, finished
from passes.lower.kernel_provider import KernelProvider
from passes.lower.variants.workload import by, dtype_name, have_example_sizes, lies_channels_last, line, spread_like

mkldnn = torch.ops.mkldnn

SUPPORTED = (torch.float32, torch.bfloat16)
LAYERS = (conv_act, aten.conv2d.default, aten.conv3d.default, linear_act, aten.linear.default)

ONEDNN_NAME = {"": "none", "silu": "swish", "gelu_tanh": "gelu"}
"""Activation names of oneDNN where they differ from the dialect's."""
ALGORITHM = {"gelu": "none", "gelu_tanh": "tanh"}
UNKNOWN_TO_ONEDNN = ("elu",)
"""Activations that torch's oneDNN kernels refuse ("Fusion behavior undefined"): they follow as ops of their own."""
WITH_RESIDUAL = ("", "relu")
"""The only activations that oneDNN's kernels take after the sum with a residual."""


@dataclass(frozen=True)
class Layer:
    """`act(f(x, w, b) + residual)`, f a convolution or a linear; operands are Values, or tensors when it is timed.

    `sizes`: padding, stride, dilation of a convolution, None for a linear. `spent`: the residual's memory may be reused.
    `input_size`: that of the example, which the layout of a packed weight suits; None where it has none.
    """

    x: Any
    w: Any
    b: Any
    residual: Any
    act: str
    act_args: list[float]
    sizes: tuple[list[int], list[int], list[int]] | None
    groups: int
    rank: int
    spent: bool
    input_size: tuple[int, ...] | None

    @classmethod
    def of(cls, call: Call) -> "Layer":
        """What an op of the dialect stands for: conv_act, linear_act, conv2d, conv3d, linear."""
        is_fused, is_linear = call.target in (conv_act, linear_act), call.target in (linear_act, aten.linear.default)
        x, w, b = (call.x, call.w, call.b) if is_fused else (call.input, call.weight, call.bias)
        residual, act, act_args = (call.residual, call.act, call.act_args) if is_fused else (None, "", [])
        sizes, groups = (None, 1) if is_linear else ((call.padding, call.stride, call.dilation), call.groups)
        spent = residual is not None and residual.dies_at(call)
        return cls(x, w, b, residual, act, act_args, sizes, groups, w.rank, spent, x.example_shape)


def objection(layer, device, dtypes):
    """Why oneDNN's kernel cannot take this layer, None when it can."""
    if layer.x.shape is None:
        return "the shape of its input is unknown"
    if layer.w.shape is None:
        return "the shape of its weight is unknown"
    if device.type != "cpu":
        return "oneDNN's kernels run on the CPU"
    if layer.x.dtype not in SUPPORTED or layer.w.dtype != layer.x.dtype:
        return f"oneDNN's kernels here take float32 and bfloat16, not {layer.x.dtype} with a weight of {layer.w.dtype}"
    sizes = [n for size in layer.sizes or () for n in size]
    if not all(isinstance(n, (int, float)) for n in (*sizes, layer.groups, *layer.act_args)):
        return "a size, or a number of the activation, is known at run time only"
    if not layer.w.is_constant:
        return "the weight is not a constant, so it cannot be packed ahead of time"
    if 0 in layer.x.shape or 0 in layer.w.shape:
        return "an operand has no elements"
    if layer.sizes is not None and (layer.x.rank != layer.w.rank or layer.w.rank not in (4, 5)):
        return "oneDNN's packed convolution takes batched 2-d and 3-d inputs"
    return None


def variants_of(layer):
    """The variants by name, the default first."""
    if layer.residual is not None or layer.act not in ("", *UNKNOWN_TO_ONEDNN):
        return {"fused": fused, "apart": apart, "plain": plain}
    return {"packed": apart, "plain": plain}


def fused(op, layer):
    if layer.residual is None:
        return kernel(op, layer, layer.act, layer.act_args)
    weight, b = packed(op, layer), bias(op, layer)
    if layer.sizes is None:
        y = op.call(mkldnn._linear_pointwise.binary, layer.x, layer.residual, weight, b, "add")
        return activated(op, y, layer.act, layer.act_args)
    # Grouped, the kernel adds in a step of its own unless in place, and supports no relu of bfloat16 then.
    adds_apart = layer.groups > 1 and not layer.spent
    inner, outer = (layer.act, "") if layer.act in WITH_RESIDUAL and not adds_apart else ("", layer.act)
    attributes = (b, *layer.sizes, layer.groups, "add", 1.0, inner or None, [], None)
    if layer.spent:
        # In any other layout the kernel adds in a step of its own, and supports no bfloat16 then. No copy in this layout.
        residual = channels_last(op, layer, layer.residual)
        y = op.call(mkldnn._convolution_pointwise_.binary, residual, layer.x, weight, *attributes)
    else:
        y = op.call(mkldnn._convolution_pointwise.binary, layer.x, layer.residual, weight, *attributes)
    return activated(op, y, outer, layer.act_args)


def apart(op, layer):
    return finished(op, layer, kernel(op, layer, "", []))


def plain(op, layer):
    if layer.sizes is None:
        return finished(op, layer, op.call(aten.linear.default, layer.x, layer.w, layer.b))
    padding, stride, dilation = layer.sizes
    y = op.call(CONVOLUTIONS[layer.rank], layer.x, layer.w, layer.b, stride, padding, dilation, layer.groups)
    return finished(op, layer, channels_last(op, layer, y))


def kernel(op, layer, act, act_args):
    """`act(f(x, w, b))` in one kernel."""
    weight, attributes = packed(op, layer), (ONEDNN_NAME.get(act, act), act_args, ALGORITHM.get(act))
    b = bias(op, layer)
    if layer.sizes is None:
        return op.call(mkldnn._linear_pointwise.default, layer.x, weight, b, *attributes)
    return op.call(mkldnn._convolution_pointwise.default, layer.x, weight, b, *layer.sizes, layer.groups, *attributes)


def packed(op, layer):
    """The weight, laid out for the kernel."""
    if layer.sizes is None:
        return op.call(prepack_linear, layer.w, math.prod((layer.input_size or (1,))[:-1]))
    return op.call(prepack_conv, layer.w, *layer.sizes, layer.groups, layer.input_size)


def bias(op, layer):
    """The bias, contiguous: the kernels read its memory as if it were, whatever its strides."""
    if layer.b is None or (isinstance(layer.b, Value) and layer.b.is_constant and layer.b.memory_format is not None):
        return layer.b
    return op.call(aten.contiguous.default, layer.b, memory_format=torch.contiguous_format)


def channels_last(op, layer, value):
    return op.call(aten.contiguous.default, value, memory_format=CHANNELS_LAST[layer.rank])


# -- timing them --------------------------------------------------------------------------------------------------------


def can_be_timed(layer: Layer) -> bool:
    return have_example_sizes(layer.x, layer.w, layer.residual)


def workload_key(layer: Layer) -> str:
    """What the speed of the variants depends on, in one line.

    `conv2d float32 1x8x6x6 channels last, weight 8x8x3x3 and bias, padding 1x1, stride 1x1, dilation 1x1, + residual in place,
    relu, 1 threads`
    """
    kind = "linear" if layer.sizes is None else f"conv{layer.rank - 2}d"
    x = f"{kind} {dtype_name(layer.x)} {by(layer.x.example_shape)}"
    sizes = [f"{name} {by(size)}" for name, size in zip(("padding", "stride", "dilation"), layer.sizes or ())]
    return line(
        x + (" channels last" if is_channels_last(layer) else ""),
        f"weight {by(layer.w.shape)}" + ("" if layer.b is None else " and bias"),
        *sizes,
        f"{layer.groups} groups" if layer.groups > 1 else "",
        "" if layer.residual is None else f"+ residual{' in place' if layer.spent else ''}",
        layer.act + (f"({', '.join(f'{v:g}' for v in layer.act_args)})" if layer.act_args else ""),
    )


def is_channels_last(layer: Layer) -> bool:
    return layer.sizes is not None and lies_channels_last(layer.x)


def on_tensors(layer: Layer) -> Layer:
    """The layer on tensors of the example's sizes, whatever their values."""
    layout = CHANNELS_LAST[layer.rank] if layer.sizes is not None else torch.contiguous_format
    x = spread_like(layer.x, layout if is_channels_last(layer) else torch.contiguous_format)
    w, b = spread_like(layer.w, torch.contiguous_format), layer.b and spread_like(layer.b, torch.contiguous_format)
    return replace(layer, x=x, w=w, b=b, residual=layer.residual and spread_like(layer.residual, layout))


LAYER_KERNELS = KernelProvider(
    "oneDNN layers",
    LAYERS,
    reference=plain,
    subgraph=lambda call: Layer.of(call),
    supports=objection,
    variants=variants_of,
    workload_key=workload_key,
    can_be_timed=can_be_timed,
    on_tensors=on_tensors,
    prepack=(prepack_conv, prepack_linear),
)
