"""The phrase of attention written by hand, and its masks."""

from __future__ import annotations

import torch

from passes.testing.phrases.layers import dropped, linear
from passes.testing.phrases.operands import at_home
from passes.testing.writer import Writer


def attention(w: Writer) -> None:
    """Attention by hand, of rank 3 and 4: scaled before or after, masked by constants or at run time, used twice."""
    x = w.value(3, 3, 4, at_least=2)
    size = w.shape(x)[-1]
    q, k, v = (linear(w, x, size) for _ in range(3)) if w.flip() else (x, x, x)
    scale = w.pick("none", "multiply", "divide", "query", "key")
    factor = round(size**-0.5, 4) * w.pick(1, 1, 1, -1)
    q = w.let(f"{q}[..., :1, :]") if w.rarely() else q  # one query, as in decoding
    if w.rarely():  # keys or values are used by every element of the batch
        w.need(w.shape(x)[0] > 1)
        k, v = (w.let(f"{k}[:1]"), v) if w.flip() else (k, w.let(f"{v}[:1]"))
    q = w.let(f"{q} * {factor}") if scale == "query" else q
    k = w.let(f"{k} * {factor}") if scale == "key" else k
    s = w.let(f"torch.matmul({q}, {k}.transpose({w.pick('-2, -1', '-1, -2')}))" if w.pick(True, True, True, False) else
              f"{q} @ {k}.mT")  # fmt: skip
    s = w.let(f"{s} * {factor}") if scale == "multiply" else w.let(f"{s} / {size**0.5:.4f}") if scale == "divide" else s
    s = masked(w, x, s)
    if w.rarely():
        w.give(w.let(f"{s}.clamp(-9, 9)"))  # the scores have another user
    dim = w.pick(-1, -1, -1, w.rank(s) - 1, -2)
    other = "torch.float32" if w.dtype == torch.float64 else "torch.float64"
    cast = f", dtype={other}" if w.rarely() else ""
    p = w.let(w.pick(f"torch.softmax({s}, {dim}{cast})", f"F.softmax({s}, dim={dim}{cast})"))
    p = at_home(w, dropped(w, p) if w.rarely() else p)
    y = w.let(w.pick(f"torch.matmul({p}, {v})", f"{p} @ {v}"))
    w.give(w.let(f"torch.nan_to_num({y}, nan=1.0)") if w.draft.values[y].isnan().any() else y)
    if w.rarely():
        w.give(p)


def masked(w: Writer, x: str, s: str) -> str:
    """The scores, masked or not. The diagonal stays, so that no row is masked throughout, but for a kind of its own."""
    n = w.shape(s)[-1]
    upper = f"torch.ones({n}, {n}, dtype=torch.bool).triu(1)"
    kind = w.pick("none", "none", "added", "filled", "filled low", "run time", "added per key", "a row", "added narrow",
                  "one by one")  # fmt: skip
    if kind == "one by one":
        hidden = w.buffer("torch.zeros(1, 1, dtype=torch.bool)")
        return w.let(w.pick(f"{s} + {w.buffer('torch.zeros(1, 1)')}", f'{s}.masked_fill({hidden}, float("-inf"))'))
    if kind == "a row":
        row = f"torch.arange({n}).eq(1).reshape(-1, 1).expand({n}, {n})"
        if w.flip():
            return w.let(f'{s}.masked_fill({w.buffer(f"{row}.clone()")}, float("-inf"))')
        return w.let(f"{s} + {w.buffer(f'torch.zeros({n}, {n}).masked_fill({row}, -torch.inf)')}")
    if kind == "added narrow":
        narrow = "torch.float32" if w.dtype == torch.float64 else "torch.bfloat16"
        return w.let(f"{s} + {w.buffer(f'torch.randn({n}, {n}).to({narrow})')}")
    if kind == "added":
        return w.let(f"{s} + {w.buffer(f'torch.full(({n}, {n}), {w.pick(-1e9, -10.0)}).triu(1)')}")
    if kind == "added per key":
        return w.let(f"{s} + {w.buffer(f'torch.randn({n})')}")
    if kind == "filled":
        return w.let(f'{s}.masked_fill({w.buffer(upper)}, float("-inf"))')
    if kind == "filled low":
        return w.let(f"{s}.masked_fill({w.buffer(upper)}, {w.pick(-1e9, 0.0, -3.4028234e38)})")
    if kind == "run time":
        w.need(w.shape(x)[-2] == n)
        return w.let(f"{s} + {x}[..., :1].transpose(-2, -1)")
    return s
