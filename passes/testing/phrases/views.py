"""Phrases of views and of ops that change the layout: transposes, reshapes, slices, chunks."""

from __future__ import annotations

from passes.testing.phrases.layers import activation, conv, linear
from passes.testing.phrases.operands import twisted
from passes.testing.writer import Writer

LAYOUT = ("transpose", "permute", "reshape", "flatten", "unsqueeze", "squeeze", "view_back", "undo")


def layout_chain(w: Writer) -> None:
    """transpose, permute, reshape, flatten, unsqueeze and squeeze in a row: some cancel, some compose."""
    # Where all axes have one size, no shape gives away that the wrong ones were exchanged.
    x = w.value(3, 4, 2) if w.flip() else w.new_input(*[w.pick(2, 3)] * w.pick(3, 2, 4))
    start = w.shape(x)
    for _ in range(w.pick(2, 3, 4)):
        rank = w.rank(x)
        kind = w.pick(*LAYOUT)
        if kind == "transpose" and rank > 1:
            a, b = w.pick((0, 1), (-1, -2), (0, -1))
            x = w.let(f"{x}.transpose({a}, {b})")
            if w.flip():
                c, d = w.pick((a, b), (b, a), (a % rank, b % rank), (-1, -2), (0, 1))
                x = w.let(f"{x}.transpose({c}, {d})")
        elif kind == "permute" and rank > 1:
            order = [(axis + 1) % rank for axis in range(rank)]
            back = [(axis - 1) % rank for axis in range(rank)]  # undoes it; `order` once more does so for rank 2
            x = w.let(f"{x}.permute({', '.join(map(str, order))})")
            if w.flip():
                x = w.let(f"{x}.permute({', '.join(map(str, w.pick(tuple(back), tuple(back), tuple(order))))})")
        elif kind == "reshape":
            x = w.let(f"{x}.reshape({', '.join(map(str, sorted(w.shape(x))))})")
        elif kind == "flatten" and rank > 2:
            x = w.let(f"{x}.flatten({w.pick(1, 0)}, {w.pick(-1, 1)})")
        elif kind == "unsqueeze" and rank < 5:
            axis = w.pick(0, 1, -1)
            x = w.let(f"{x}.unsqueeze({axis})")
            x = w.let(f"{x}.squeeze({w.pick(axis, axis, 0)})") if w.flip() else x
        elif kind == "squeeze" and 1 in w.shape(x) and rank > 1:
            x = w.let(f"{x}.squeeze({w.shape(x).index(1)})")
        elif kind == "view_back":
            x = w.let(f"{x}.reshape({', '.join(map(str, start))})")
    w.give(twisted(w, w.let(f"{x} + 1.0")) if w.flip() else x)


def pieces(w: Writer) -> None:
    """chunk and split of a layer's result, put together again, in order or not."""
    x = w.value(3, 2, 4)
    y = linear(w, x, 4)
    a, b = (w.let(f"{y}.{w.pick('chunk(2, -1)', 'split(2, -1)')}[{i}]") for i in (0, 1))
    w.give(w.let(w.pick(f"torch.cat([{a}, {b}], -1)", f"torch.cat([{b}, {a}], -1)", f"{a} * torch.sigmoid({b})",
                        f"{a} + {b}", f"torch.stack([{a}, {b}])")))  # fmt: skip


def stepped(w: Writer) -> None:
    """A layer on what strides, slices or expansion left of a value."""
    x = w.value(4, 3, 5, at_least=4)
    y = w.let(w.pick(f"{x}[..., ::2]", f"{x}.flip(-1)", f"{x}[:1].expand(2{', -1' * (w.rank(x) - 1)})",
                     f"{x}.transpose(-1, -2)", f"{x}.narrow(-1, 1, 2)"))  # fmt: skip
    w.give(activation(w, linear(w, y) if w.flip() or w.rank(y) == 5 else conv(w, y, w.rank(y) - 2, kernel=1)))
