"""The phrase of expressions that overflow or lose digits as they are written: log of softmax, exp(x) - 1, ..."""

from __future__ import annotations

from passes.testing.phrases.operands import at_home
from passes.testing.writer import Writer

FRAGILE = ("log_softmax", "softmax", "below largest", "logsumexp", "log1p", "expm1", "logsigmoid", "integers")


def fragile(w: Writer) -> None:
    """Expressions that lose digits written out: log of softmax, log of a sum of exps, exp(x) - 1, ...; and near misses."""
    x = w.let(f"torch.tanh({w.value(2, 3, 4)})")
    for kind in {w.pick(*FRAGILE): None for _ in range(w.pick(4, 3, 5, 1))}:
        y, last = fragile_form(w, x, kind)
        w.give(*([y] if w.rarely() else []), last)


def fragile_form(w: Writer, x: str, kind: str) -> tuple[str, str]:
    """One of `FRAGILE`: a value inside, and the result. `x` is between -1 and 1."""
    d = w.pick(-1, 1, 0)
    w.need(w.shape(x)[d])
    other = w.pick(d, d, d, d, 0 if d else 1, (0, 1))
    if kind == "log_softmax":
        y = w.let(f"torch.softmax({x}, {d})")
        return y, w.let(f"torch.log({y})")
    if kind == "below largest":
        rest = ", keepdim=True"
        y = w.let(w.pick(f"{x}.amax({other}{rest})", f"{x}.max({d}{rest}).values", f"{x}.max({d}{rest})[0]"))
        return y, w.let(w.pick(f"torch.softmax({x} - {y}, {d})", f"F.softmax({x}.sub({y}), dim={d})"))
    if kind == "logsigmoid":
        y = w.let(f"torch.sigmoid({x})")
        return y, w.let(f"torch.log({y})")
    if kind == "log1p":
        y = w.let(w.pick(f"{x}.abs()", f"torch.exp({x})"))
        return y, w.let(f"torch.log({w.pick(f'1 + {y}', f'{y}.add(1.0)', f'{y} + 1', f'{y} + 1.5')})")
    if kind == "integers":
        n = w.let(f"{w.new_input(2, 3)}.abs().clamp(max=3).to(torch.int64)")
        return x, at_home(w, w.let(w.pick(f"torch.log(1 + {n})", f"torch.exp({n}) - 1", f"torch.log({n}.exp().sum(-1))")))
    y = w.let(f"torch.exp({x})")
    if kind == "expm1":
        return y, w.let(w.pick(f"{y} - 1", f"torch.sub({y}, 1)", f"{y} - 1.0", f"{y}.sub(1)", f"{y} - 2", f"1 - {y}"))
    if kind == "softmax":
        keep = ", keepdim=True" if w.pick(True, True, True, True, False) else ""
        again = y if w.flip() else w.let(f"torch.exp({x})")
        return y, w.let(f"{again} / {y}.sum({w.pick(d, d, d, other, (0, 1))}{keep})")
    axes = w.pick(other, other, other, ())
    return y, w.let(f"torch.log(torch.sum({y}, {axes}{w.pick('', ', keepdim=True')}))")
