"""Phrases of in-place writes: into the result of a layer, and into an input of the model."""

from __future__ import annotations

from passes.testing.phrases.layers import activation, conv_or_linear, linear
from passes.testing.writer import Writer


def written(w: Writer) -> None:
    """In-place ops on a layer's result: on all of it, on a slice, used before through a view."""
    _, y, _ = conv_or_linear(w)
    view = w.let(w.pick(f"{y}.flatten()", f"{y}[..., :1]", f"{y}.unsqueeze(0)", f"{y}.transpose(0, -1)"))
    early = w.let(f"{view} * 2") if w.flip() else None
    w.do(w.pick(f"{y}.add_(1.0)", f"{y}.mul_(0.5)", f"{y}.relu_()", f"{y}[..., 0].mul_(2.0)", f"{y}[..., :1] = 0.5",
                f"{view}.mul_(3.0)", f"{view}.zero_()"))  # fmt: skip
    late = w.let(f"{view} + 1.0")
    z = activation(w, y) if w.flip() else w.let(f"torch.sigmoid({y})")
    w.give(*([early] if early else []), late, z)


def written_input(w: Writer) -> None:
    """A write into an input of the model, seen by what uses it later."""
    x = w.new_input(2, w.pick(4, 2), w.pick(4, 5), plain=True)
    before = w.let(f"{x} * 2")
    w.do(w.pick(f"{x}.add_(1.0)", f"{x}[:, 0].mul_(0.5)"))
    w.give(before, linear(w, x))
