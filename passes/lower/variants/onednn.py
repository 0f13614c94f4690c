"""The forms in which oneDNN can compute  act(product(x, w, b) + residual),  the product a convolution or a linear.

    fused     one kernel                     mkldnn::_convolution_pointwise(x, pack(w), b, act)
    apart     a packed product, the rest     relu(mkldnn::_convolution_pointwise(x, pack(w), b, none) + residual)
    packed    the same, where there is nothing to fuse: no residual, and no activation that oneDNN knows
    plain     all in ATen                    relu(conv2d(x, w, b) + residual)
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ir_tools.ir.dialect import aten, conv_act, linear_act
from ir_tools.ir.program import Packing
from ir_tools.rewrite import Call, Value
from ir_tools.rewrite.decompositions import CONVOLUTIONS, activated, finished
from passes.lower.variants.workload import OnTensors, by, dtype_name, have_example_sizes, line, spread_like

mkldnn = torch.ops.mkldnn

ONEDNN_NAME = {"": "none", "silu": "swish", "gelu_tanh": "gelu"}
"""Activation names of oneDNN where they differ from the dialect's."""
ALGORITHM = {"gelu": "none", "gelu_tanh": "tanh"}
UNKNOWN_TO_ONEDNN = ("elu",)
"""Activations that torch's oneDNN kernels refuse ("Fusion behavior undefined"): they follow as ops of their own."""
WITH_RESIDUAL = ("", "relu")
"""The only activations that oneDNN's kernels take after the sum with a residual."""
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Product:
    """`act(product(x, w, b) + residual)`; operands are Values, or tensors when it is timed.

    `sizes`: padding, stride, dilation of a convolution, None for a linear. `spent`: the residual's memory may be reused.
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
    packing: Packing

    @classmethod
    def of(cls, call: Call) -> "Product":
        """What an op of the dialect stands for: conv_act, linear_act, conv2d, conv3d, linear."""
        is_fused, is_linear = call.target in (conv_act, linear_act), call.target in (linear_act, aten.linear.default)
        x, w, b = (call.x, call.w, call.b) if is_fused else (call.input, call.weight, call.bias)
        residual, act, act_args = (call.residual, call.act, call.act_args) if is_fused else (None, "", [])
        sizes, groups = (None, 1) if is_linear else ((call.padding, call.stride, call.dilation), call.groups)
        if sizes is None:
            packing = Packing("linear", batch=math.prod((x.example_shape or (1,))[:-1]))
        else:
            packing = Packing("conv", *sizes, groups, x.example_shape)
        spent = residual is not None and residual.dies_at(call)
        return cls(x, w, b, residual, act, act_args, sizes, groups, w.rank, spent, packing)


def forms_of(p):
    """The forms by name, the favourite first."""
    if p.residual is not None or p.act not in ("", *UNKNOWN_TO_ONEDNN):
        return {"fused": fused, "apart": apart, "plain": plain}
    return {"packed": apart, "plain": plain}


def fused(op, p):
    if p.residual is None:
        return kernel(op, p, p.act, p.act_args)
    weight, b = op.packed(p.w, p.packing), bias(op, p)
    if p.sizes is None:
        y = op.call(mkldnn._linear_pointwise.binary, p.x, p.residual, weight, b, "add")
        return activated(op, y, p.act, p.act_args)
    # Of grouped convolutions the kernel adds by itself unless in place, and knows no relu of bfloat16 then.
    by_itself = p.groups > 1 and not p.spent
    inner, outer = (p.act, "") if p.act in WITH_RESIDUAL and not by_itself else ("", p.act)
    attributes = (b, *p.sizes, p.groups, "add", 1.0, inner or None, [], None)
    if p.spent:
        # In any other layout the kernel adds by itself, and knows no bfloat16 then. Free where the layout is right.
        residual = channels_last(op, p, p.residual)
        y = op.call(mkldnn._convolution_pointwise_.binary, residual, p.x, weight, *attributes)
    else:
        y = op.call(mkldnn._convolution_pointwise.binary, p.x, p.residual, weight, *attributes)
    return activated(op, y, outer, p.act_args)


def apart(op, p):
    return finished(op, p, kernel(op, p, "", []))


def plain(op, p):
    if p.sizes is None:
        return finished(op, p, op.call(aten.linear.default, p.x, p.w, p.b))
    padding, stride, dilation = p.sizes
    y = op.call(CONVOLUTIONS[p.rank], p.x, p.w, p.b, stride, padding, dilation, p.groups)
    return finished(op, p, channels_last(op, p, y))


def kernel(op, p, act, act_args):
    """`act(product(x, w, b))` in one kernel."""
    weight, attributes = op.packed(p.w, p.packing), (ONEDNN_NAME.get(act, act), act_args, ALGORITHM.get(act))
    if p.sizes is None:
        return op.call(mkldnn._linear_pointwise.default, p.x, weight, bias(op, p), *attributes)
    return op.call(mkldnn._convolution_pointwise.default, p.x, weight, bias(op, p), *p.sizes, p.groups, *attributes)


def bias(op, p):
    """The bias, contiguous: the kernels read its memory as if it were, whatever its strides."""
    if p.b is None or (isinstance(p.b, Value) and p.b.is_constant and p.b.memory_format is not None):
        return p.b
    return op.call(aten.contiguous.default, p.b, memory_format=torch.contiguous_format)


def channels_last(op, p, value):
    return op.call(aten.contiguous.default, value, memory_format=CHANNELS_LAST[p.rank])


# -- timing them --------------------------------------------------------------------------------------------------------


def can_be_timed(p: Product) -> bool:
    return have_example_sizes(p.x, p.w, p.residual)


def signature(p: Product) -> str:
    """What the speed of the forms depends on, in one line.

    `conv2d float32 1x8x6x6 channels last, weight 8x8x3x3 and bias, padding 1x1, stride 1x1, dilation 1x1, + residual in place,
    relu, 1 threads`
    """
    kind = "linear" if p.sizes is None else f"conv{p.rank - 2}d"
    x = f"{kind} {dtype_name(p.x)} {by(p.x.example_shape)}"
    sizes = [f"{name} {by(size)}" for name, size in zip(("padding", "stride", "dilation"), p.sizes or ())]
    return line(
        x + (" channels last" if is_channels_last(p) else ""),
        f"weight {by(p.w.shape)}" + ("" if p.b is None else " and bias"),
        *sizes,
        f"{p.groups} groups" if p.groups > 1 else "",
        "" if p.residual is None else f"+ residual{' in place' if p.spent else ''}",
        p.act + (f"({', '.join(f'{v:g}' for v in p.act_args)})" if p.act_args else ""),
    )


def is_channels_last(p: Product) -> bool:
    """The layout of x when the file runs: ops hand on that of the convolutions before them, and inputs are as they come."""
    return p.sizes is not None and isinstance(p.x, Call)


def timed_forms(p: Product) -> dict[str, Any]:
    """The forms as calls on tensors of the example's sizes, whatever their values."""
    layout = CHANNELS_LAST[p.rank] if p.sizes is not None else torch.contiguous_format
    x = spread_like(p.x, layout if is_channels_last(p) else torch.contiguous_format)
    w, b = spread_like(p.w, torch.contiguous_format), p.b and spread_like(p.b, torch.contiguous_format)
    on_tensors = replace(p, x=x, w=w, b=b, residual=p.residual and spread_like(p.residual, layout))
    op = OnTensors()
    return {name: partial(form, op, on_tensors) for name, form in forms_of(p).items()}
