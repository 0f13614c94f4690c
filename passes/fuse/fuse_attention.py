"""Fuse attention that is written out by hand.

    softmax(q kᵀ * c + mask, -1) v  ->  scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=c)

c: any of `* c`, `/ c`, on the scores, on q or on k; a number, or a constant of one element.   + mask: or none, or
masked_fill(hidden, -inf), which becomes a mask of 0 and -inf, or `is_causal`.   kᵀ: any op that swaps the last two axes, or k
as it is given.

A row of the mask that is -inf throughout gives NaN by hand and 0 in the fused op: the mask must be known now, and have none.

Compared with attention by hand, 12 heads of 64 on one thread, without and with a causal mask: float32 runs 1.0 and 1.4 times
as fast at 128 tokens, 1.2 and 3.0 at 512, 3.0 and 5.9 at 1024. In bfloat16 the fused kernel of torch 2.13 is slower where the
scores fit the caches: 0.4 and 0.8 at 128 tokens, 0.5 and 0.7 at 512, but 1.9 and 3.9 at 1024. So lower_onednn measures which of
the two is faster, and may take the fused op apart again.
Source: Vaswani and others, "Attention Is All You Need", 2017, equation 1.
"""

import math

import torch
from torch import Tensor

from ir_tools.rewrite import Known, Rule, Value, rule_pass


def attention(op, q: Value, k: Value, kt: Value, v: Value, mask: Value | Known | None, hidden: Value | Known | None,
              fill: Known | float, axis: int, cast: torch.dtype | None, dtype: torch.dtype,
              a: Known | float, b: Known | float, c: Known | float):  # fmt: skip
    def product(x, y, name=None):
        return op.one_of(op.matmul(x, y, name=name), op.bmm(x, y, name=name))

    def scaled(x, factor, name):
        return op.one_of(op.mul(x, factor), op.div(x, factor, rounding_mode=None, name=name), x)

    swapped = op.one_of(
        op.permutation(scaled(k, b, "k_by"), ..., name="swap"), scaled(op.permutation(k, ..., name="swap"), b, "k_by")
    )
    keys = op.one_of(swapped, scaled(kt, b, "k_by"))
    scores = scaled(product(scaled(q, a, "q_by"), keys), c, "by")
    seen = op.one_of(op.add(scores, mask, alpha=1), op.masked_fill(scores, hidden, fill), scores)
    weights = op.softmax(seen, axis, cast, name="weights")
    return product(op.one_of(weights, op.to(weights, dtype, ...)), v)


def factors_are_numbers(a, b, c):
    """Each factor is one finite number, and not zero."""
    return all(f is None or (number(f) is not None and math.isfinite(number(f)) and number(f) != 0) for f in (a, b, c))


def keys_are_transposed(swap):
    """The op on the keys swaps the last two axes, and nothing else."""
    if swap is None:
        return True
    order = swap.axis_order
    return order is not None and len(order) > 1 and order == [*range(len(order) - 2), len(order) - 1, len(order) - 2]


def softmax_is_over_the_keys(weights, axis):
    """The softmax goes over the last axis, that of the keys."""
    return None if weights.rank is None else axis in (-1, weights.rank - 1)


def softmax_is_in_the_dtype(weights, q):
    """The softmax computes in the dtype of the query."""
    return weights.dtype == q.dtype


def operands_are_alike(q, k, kt, v, weights):
    """Query, key and value have one floating dtype, 3 to 5 axes, and the same leading sizes (nothing broadcasts)."""
    keys = kt if k is None else k
    if any(x.shape is None for x in (q, keys, v, weights)):
        return None
    leading = {x.shape[:-2] for x in (q, keys, v, weights)}
    sizes = (q.shape[-2], keys.shape[-1 if k is None else -2])  # of the scores
    alike = q.dtype == keys.dtype == v.dtype and len(leading) == 1 and weights.shape[-2:] == sizes
    return alike and v.shape[-2] == sizes[1] and q.dtype.is_floating_point and 3 <= q.rank <= 5


def mask_is_known_now(mask, hidden):
    """The mask is a constant (a runtime mask might hide a whole row: NaN by hand, 0 in the fused op)."""
    return all(m is None or isinstance(m, Tensor) for m in (mask, hidden))


def hidden_scores_are_minus_infinity(hidden, fill):
    """Hidden scores become -inf (a finite number replaces a score, where a mask is added to it)."""
    return hidden is None or number(fill) == -math.inf


def mask_has_the_dtype(mask, q):
    """The mask has the dtype of the query."""
    return mask is None or mask.dtype == q.dtype


def each_row_sees_something(mask, hidden):
    """No row of the mask is -inf throughout, and none holds NaN or +inf."""
    if mask is None:
        return hidden is None or not hidden.all(-1).any()
    return not ((mask == -math.inf).all(-1).any() or mask.isnan().any() or (mask == math.inf).any())


def number(factor):
    """A plain number, or that in a tensor of one element; None for other tensors."""
    if isinstance(factor, Tensor):
        return factor.double().item() if factor.numel() == 1 and not factor.is_complex() else None
    return factor


def scale_of(a, b, c, q_by, k_by, by):
    """The product of the factors, 1 where there is none; `q_by`, `k_by`, `by`: the divisions among them."""
    scale = 1.0
    for factor, division in ((a, q_by), (b, k_by), (c, by)):
        if factor is not None:
            scale = scale * number(factor) if division is None else scale / number(factor)
    return scale


def fused(op, q, k, kt, v, mask, hidden, a, b, c, q_by, k_by, by):
    if hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=hidden.device).masked_fill(hidden, -math.inf)
    mask = mask if mask is not None and mask.any() else None
    keys = op.transpose(kt, -2, -1) if k is None else k
    scale = scale_of(a, b, c, q_by, k_by, by)
    # The kernel scales hidden scores too: -inf times a negative scale is +inf, which hides nothing.
    causal = mask is not None and scale > 0 and hides_what_comes_later(mask, q.shape[-2], keys.shape[-2])
    if mask is not None and mask.dim() < 2:
        mask = mask.reshape(1, -1)
    return op.scaled_dot_product_attention(q, keys, v, None if causal else mask, 0.0, causal, scale=scale)


def hides_what_comes_later(mask, queries, keys):
    """The mask is that of `is_causal`, whose kernel skips what is hidden: -inf behind the diagonal of a square, 0 elsewhere."""
    square = queries == keys and mask.shape[-2:] == (queries, keys)
    return square and bool((mask == torch.full((queries, keys), -math.inf).triu(1).to(mask)).all())


fuse_attention = rule_pass(
    "fuse_attention",
    [
        Rule("softmax(q kᵀ * c + mask) v -> scaled_dot_product_attention(q, k, v, mask, c)",
             match=attention, when=(factors_are_numbers, keys_are_transposed),
             requires=(softmax_is_over_the_keys, softmax_is_in_the_dtype, operands_are_alike, mask_is_known_now,
                       hidden_scores_are_minus_infinity, mask_has_the_dtype, each_row_sees_something),
             replace=fused),
    ],
    effects={"rounds"},
    doc=__doc__,
)  # fmt: skip
