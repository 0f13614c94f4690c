"""The variants of a mean over all pixels:  mean(x, (2, 3)),  adaptive_avg_pool2d(x, 1)

    mean      as it is           mean(x, (2, 3), keepdim)
    pooled    one big window     avg_pool2d(x, (height, width)), without the two axes where the mean keeps none

Torch's mean of a half dtype copies x to float32 first; its pooling kernel sums in float as it reads.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ir_tools.ir.dialect import aten
from ir_tools.rewrite import Call
from passes.lower.kernel_provider import KernelProvider
from passes.lower.variants.workload import by, dtype_name, have_example_sizes, lies_channels_last, line, spread_like

MEANS = (aten.mean.dim, aten.adaptive_avg_pool2d.default)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Pooling:
    """The mean over height and width of `x`, a Value [batch, channels, height, width] (a tensor when it is timed)."""

    x: Any
    target: Any
    window: list[int]
    keeps_axes: bool

    @classmethod
    def of(cls, call: Call) -> "Pooling | None":
        """What a mean or pooling op stands for; None for other axes, other sizes, other devices."""
        x, is_mean = call.self, call.target is aten.mean.dim
        if x.shape is None or x.rank != 4 or x.device.type != "cpu" or x.dtype not in DTYPES:
            return None
        if not all(isinstance(size, int) and size > 0 for size in x.shape):
            return None
        over_pixels = sorted(axis % 4 for axis in call.dim or ()) == [2, 3] if is_mean else call.output_size == [1, 1]
        if call.dtype != x.dtype or not over_pixels:
            return None
        return cls(x, call.target, list(x.shape[2:]), call.keepdim if is_mean else True)


def variants_of(p):
    """The variants by name, the default first."""
    return {"mean": mean, "pooled": pooled}


def mean(op, p):
    if p.target is aten.mean.dim:
        return op.call(aten.mean.dim, p.x, [2, 3], p.keeps_axes)
    return op.call(aten.adaptive_avg_pool2d.default, p.x, [1, 1])


def pooled(op, p):
    y = op.call(aten.avg_pool2d.default, p.x, p.window)
    return y if p.keeps_axes else op.call(aten.flatten.using_ints, y, 1)


# -- timing them --------------------------------------------------------------------------------------------------------


def can_be_timed(p: Pooling) -> bool:
    return have_example_sizes(p.x)


def workload_key(p: Pooling) -> str:
    """What the speed of the variants depends on, in one line: `mean bfloat16 1x192x48x48 channels last, 1 threads`."""
    return line(f"mean {dtype_name(p.x)} {by(p.x.example_shape)}" + (" channels last" if lies_channels_last(p.x) else ""))


def on_tensors(p: Pooling) -> Pooling:
    """The mean of a tensor of the example's sizes, whatever its values."""
    return replace(p, x=spread_like(p.x, torch.channels_last if lies_channels_last(p.x) else torch.contiguous_format))


POOLING_KERNELS = KernelProvider(
    "pooling",
    MEANS,
    reference=mean,
    subgraph=lambda call: Pooling.of(call),
    variants=variants_of,
    workload_key=workload_key,
    can_be_timed=can_be_timed,
    on_tensors=on_tensors,
)
