"""The variants of attention that `fuse_attention` fused:  softmax(q kᵀ * scale + mask, -1) v

    fused     one kernel         scaled_dot_product_attention(q, k, v, mask, scale)
    apart     as if by hand      matmul(softmax(matmul(q * scale, kᵀ) + mask, -1), v)

Torch's fused kernel on the CPU never holds all scores at once, which is faster where they do not fit the caches. Where they do,
in bfloat16, it takes up to twice the time of the products and the softmax one after the other.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from ir_tools.ir.dialect import aten
from ir_tools.rewrite import Call
from passes.lower.kernel_provider import KernelProvider
from passes.lower.variants.workload import by, dtype_name, have_example_sizes, line, spread_like

ATTENTION = aten.scaled_dot_product_attention.default


def is_ours(call: Call) -> bool:
    """The fused op stands for attention written by hand. One that the model itself calls stays as it is."""
    return call.target is ATTENTION and call.made_by("fuse_attention")


def later_keys(queries: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """The mask of `is_causal`: -inf behind the diagonal."""
    return torch.full((queries, keys), -math.inf, dtype=dtype).triu(1)


@dataclass(frozen=True)
class Attention:
    """`softmax(q kᵀ * scale + mask, -1) v`; operands are Values, or tensors when it is timed."""

    q: Any
    k: Any
    v: Any
    mask: Any
    causal: bool
    scale: float

    @classmethod
    def of(cls, call: Call) -> "Attention | None":
        """What the fused op stands for; None for uses of it that `fuse_attention` does not make, and other devices."""
        q, k, v, mask, causal = call.query, call.key, call.value, call.attn_mask, call.is_causal
        operands = [q, k, v] if mask is None else [q, k, v, mask]
        if call.dropout_p != 0 or call.enable_gqa or (causal and mask is not None):
            return None
        if any(x.shape is None or x.dtype != q.dtype or x.device.type != "cpu" for x in operands):
            return None
        needed = ([q.shape[-1]] if call.scale is None else []) + ([q.shape[-2], k.shape[-2]] if causal else [])
        if not all(isinstance(size, int) and size > 0 for size in needed):
            return None
        scale = 1 / math.sqrt(q.shape[-1]) if call.scale is None else call.scale
        return cls(q, k, v, mask, causal, scale)


def variants_of(a):
    """The variants by name, the default first."""
    return {"fused": fused, "apart": apart}


def fused(op, a):
    return op.call(ATTENTION, a.q, a.k, a.v, a.mask, 0.0, a.causal, scale=a.scale)


def apart(op, a):
    # The scale goes to the query, which is smaller than the scores.
    q = a.q if a.scale == 1 else op.call(aten.mul.Scalar, a.q, a.scale)
    scores = op.call(aten.matmul.default, q, op.call(aten.transpose.int, a.k, -2, -1))
    mask = op.once(later_keys, a.q.shape[-2], a.k.shape[-2], a.q.dtype) if a.causal else a.mask
    seen = scores if mask is None else op.call(aten.add.Tensor, scores, mask)
    return op.call(aten.matmul.default, op.call(aten.softmax.int, seen, -1), a.v)


# -- timing them --------------------------------------------------------------------------------------------------------


def can_be_timed(a: Attention) -> bool:
    return have_example_sizes(a.q, a.k, a.v, a.mask) and 0 not in (*a.q.example_shape, *a.k.example_shape)


def workload_key(a: Attention) -> str:
    """What the speed of the variants depends on, in one line; behind "at" are strides.

    `attention bfloat16, q 1x12x128x64 at 98304x64x768x1, k 1x12x128x64 at 98304x64x768x1, v 1x12x128x64 at 98304x64x768x1,
    causal, scaled, 1 threads`
    """
    operands = {"q": a.q, "k": a.k, "v": a.v} | ({} if a.mask is None else {"mask": a.mask})
    return line(
        f"attention {dtype_name(a.q)}",
        *[f"{name} {by(x.example_shape)} at {by(x.example_strides)}" for name, x in operands.items()],
        "causal" if a.causal else "",
        "scaled" if a.scale != 1 else "",
    )


def on_tensors(a: Attention) -> Attention:
    """The attention on tensors of the example's sizes and layouts, whatever their values."""
    return replace(a, q=spread_like(a.q), k=spread_like(a.k), v=spread_like(a.v), mask=a.mask and spread_like(a.mask))


ATTENTION_KERNELS = KernelProvider(
    "attention",
    [ATTENTION],
    reference=apart,
    when=lambda call: is_ours(call),
    subgraph=lambda call: Attention.of(call),
    variants=variants_of,
    workload_key=workload_key,
    can_be_timed=can_be_timed,
    on_tensors=on_tensors,
)
