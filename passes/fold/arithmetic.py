"""The arithmetic of folds: a layer's new weight and bias when its input or output is scaled and shifted.

A *layer* is a convolution, a transposed convolution or a linear, `y = layer(x, w, b)`, and *per channel* means one number for
each of its input or output channels. With s and t per channel,

    s * layer(x, w, b) + t       =  layer(x, w', s * b + t)            w' = w with its output channels scaled
    layer(s * x + t, w, b)       =  layer(x, w', b + layer_sum(t))     w' = w with its input channels scaled

where the second needs every output to see a whole window of the input: zeros that the layer pads are not shifted. All of it
is computed in float64, and rounded once, by `refolded`.

Weights are (out, in / groups, *kernel) for convolutions, (in, out / groups, *kernel) for transposed ones, and (out, in) for
linears.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ir_tools.ir.dialect import TRANSPOSED_CONVOLUTIONS, aten
from ir_tools.rewrite import Call, Value

NOT_FINITE = "the folded weight or bias would not be finite"
LOST_DIGITS = "the folded weight or bias is too small for its dtype, which would lose its digits"
LARGE_SHIFT = "the shift is so large that the sum would lose digits to it"

MOST_ROUNDED = 4.0
"""Rounding errors of a folded weight, in units of its dtype: more says that it underflows."""
MOST_LOST: dict[torch.dtype, float] = {
    torch.float64: 1e-11, torch.float32: 2.0**-14, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-7,
}  # fmt: skip
"""What a shift of the input may lose, of an input that varies by about one: rounding of what is added up with it."""


def is_linear(layer: Call) -> bool:
    return layer.target is aten.linear.default


def is_transposed(layer: Call) -> bool:
    return layer.target in TRANSPOSED_CONVOLUTIONS


def channel_axis(w: Tensor) -> int:
    """The axis of a layer's input and output that holds channels, counted from the end (an input may have no batch axis)."""
    return 1 - w.dim()


def output_channels(layer: Call, w: Tensor) -> int:
    return w.shape[1] * layer.groups if is_transposed(layer) else w.shape[0]


def input_channels(layer: Call, w: Tensor) -> int:
    if is_linear(layer):
        return w.shape[1]
    return w.shape[0] if is_transposed(layer) else w.shape[1] * layer.groups


def is_per_channel(c: Tensor | float, channels: int, axis: int) -> bool:
    """`c` broadcasts as one number, or as one number per channel along `axis` (negative)."""
    if not isinstance(c, Tensor) or c.numel() == 1:
        return True
    along = c.shape[axis] if c.dim() >= -axis else 0
    return along == c.numel() == channels


def per_channel(c: Tensor | float, channels: int, w: Tensor) -> Tensor:
    """`c` as a float64 tensor of shape (channels,), where the weight is."""
    return torch.as_tensor(c, dtype=torch.float64, device=w.device).reshape(-1).expand(channels)


def is_large_shift(t: Tensor, w: Tensor) -> bool:
    """A shift of `t`, folded into the sum that the layer computes in w's dtype, would cost too many digits."""
    lost = t.abs().max().item() * torch.finfo(w.dtype).eps if t.numel() and w.is_floating_point() else 0.0
    return lost > MOST_LOST.get(w.dtype, 0.0)


def scaled_outputs(layer: Call, w: Tensor, s: Tensor) -> Tensor:
    """`w'` with `layer(x, w') = s * layer(x, w)`, in float64."""
    if is_transposed(layer):
        groups = w.double().unflatten(0, (layer.groups, -1))  # groups, in / groups, out / groups, *kernel
        return (groups * _along(s.reshape(layer.groups, 1, -1), groups)).flatten(0, 1)
    return w.double() * _along(s, w)


def scaled_inputs(layer: Call, w: Tensor, s: Tensor) -> Tensor:
    """`w'` with `layer(x, w') = layer(s * x, w)`, in float64."""
    if is_transposed(layer):
        return w.double() * _along(s, w)
    groups = w.double().unflatten(0, (_groups(layer), -1))  # groups, out / groups, in / groups, *kernel
    return (groups * _along(s.reshape(_groups(layer), 1, -1), groups)).flatten(0, 1)


def layer_sum(layer: Call, w: Tensor, t: Tensor) -> Tensor:
    """What a whole window of inputs equal to `t` gives: (output channels,), in float64."""
    if is_transposed(layer):  # of kernel 1: a window is one input
        groups = w.double().unflatten(0, (layer.groups, -1)).flatten(3).sum(3)
        return torch.einsum("gio,gi->go", groups, t.reshape(layer.groups, -1)).flatten()
    groups = w.double().flatten(2).sum(2) if w.dim() > 2 else w.double()
    groups = groups.unflatten(0, (_groups(layer), -1))
    return torch.einsum("goi,gi->go", groups, t.reshape(_groups(layer), -1)).flatten()


def every_output_sees_a_whole_window(layer: Call, w: Tensor) -> bool:
    """Nothing is padded onto the input; of a transposed convolution, no output sees part of a window."""
    if is_linear(layer):
        return True
    if is_transposed(layer) and not all(size == 1 for size in (*w.shape[2:], *layer.stride)):
        return False
    return all(size == 0 for size in (*layer.padding, *(layer.output_padding if is_transposed(layer) else ())))


def batch_norm_as_affine(gamma, beta, mean, var, eps) -> tuple[Tensor, Tensor]:
    """`s` and `t` with `batch_norm(x) = s * x + t`, in float64. A missing gamma is 1, a missing beta 0.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1 (inference).
    """
    s = 1 / torch.sqrt(var.double() + eps)
    s = s if gamma is None else gamma.double() * s
    t = -mean.double() * s
    return s, t if beta is None else beta.double() + t


def normalises_channels(layer: Call, value: Value, w: Tensor) -> bool | None:
    """The channels of `value`, an input or output of the layer, are its second axis, which a batch norm normalises."""
    return None if value.rank is None else value.rank == w.dim()


def refolded(op, layer: Call, x: Value, w: Tensor, new_w: Tensor, b: Tensor | None) -> Value | None:
    """The layer on `x` with another weight and bias, rounded once to the dtype of its weight `w`, and in w's memory layout."""
    if not w.is_floating_point():
        return op.decline("the weight is not of a floating dtype")
    bias = None if b is None else b.to(w.dtype)
    weight = _in_layout_of(w, new_w)
    if not all(t.isfinite().all() for t in (weight, bias) if t is not None):
        return op.decline(NOT_FINITE)
    if _loses_digits(weight, new_w) or (b is not None and _loses_digits(b.to(w.dtype), b)):
        return op.decline(LOST_DIGITS)
    return op.like(layer, x, weight, bias)


def _loses_digits(rounded: Tensor, exact: Tensor) -> bool:
    error = (rounded.double() - exact).norm()
    return bool(error > MOST_ROUNDED * torch.finfo(rounded.dtype).eps * exact.norm())


def _in_layout_of(w: Tensor, new: Tensor) -> Tensor:
    if new.shape == w.shape:
        return torch.empty_like(w).copy_(new)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(w.dim(), torch.contiguous_format)
    kept = last if w.is_contiguous(memory_format=last) else torch.contiguous_format
    return new.to(w.dtype, memory_format=kept)


def _groups(layer: Call) -> int:
    return 1 if is_linear(layer) else layer.groups


def _along(s: Tensor, w: Tensor) -> Tensor:
    return s.reshape(*s.shape, *[1] * (w.dim() - s.dim()))
