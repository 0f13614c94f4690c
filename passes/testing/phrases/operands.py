"""What phrases put between layers: constants to scale and shift with, residual sums, and what makes rules refuse."""

from __future__ import annotations

from passes.testing.phrases.layers import dropped
from passes.testing.writer import Writer


def operand(w: Writer, x: str, axis: int) -> str:
    """A constant to scale or shift `x` with: mostly a number or one value per channel (`axis`), never 0."""
    shape = w.shape(x)
    column = [1] * len(shape)
    column[axis] = shape[axis]
    kind = w.pick("channel", "channel", "number", "no batch", "scalar", "full", "other axis", "wide")
    if kind == "number":
        return str(w.number())
    if kind == "scalar":
        return w.buffer("torch.tensor(1.5)")
    if kind == "full":
        column = list(shape)
    elif kind == "other axis":
        column = [1] * len(shape)
        other = w.pick(*range(len(shape)))
        column[other] = shape[other]
    elif kind == "no batch":
        column = column[1:] if axis > 0 and len(column) > 1 else column
    dtype = ", dtype=torch.float64" if kind == "wide" else ""
    return w.buffer(f"torch.rand({', '.join(map(str, column))}{dtype}) + 0.5")


def affine(w: Writer, x: str, axis: int) -> str:
    """A multiplication, sum, difference or quotient of `x` and a constant, in either order."""
    c = operand(w, x, axis)
    return w.let(w.pick(f"{x} * {c}", f"{x} + {c}", f"{c} * {x}", f"{c} + {x}", f"{x} - {c}", f"{c} - {x}", f"{x} / {c}",
                        f"torch.add({x}, {c}, alpha=2)", f"torch.sub({x}, {c}, alpha=0.5)", f"-{x}"))  # fmt: skip


def channel_values(w: Writer, x: str, axis: int) -> str:
    """A number, or a constant with one value for each element of the axis of `x`, never 0."""
    if w.flip():
        return str(w.number())
    return w.buffer(f"torch.rand({w.shape(x)[axis]}{', 1' * (w.rank(x) - 1 - axis)}) + 0.5")


def summed(w: Writer, x: str, y: str) -> str:
    """A residual sum of `y`, a layer's result: of `x` where the shapes allow it, else of a mean of it or a new input."""
    same = w.shape(x) == w.shape(y) and w.draft.values[x].dtype == w.draft.values[y].dtype
    other = x if same and not w.rarely() else w.new_input(*w.shape(y))
    if w.rarely() and w.rank(other) > 1:
        other = w.let(f"{other}.mean({w.pick(0, 1, w.rank(other) - 1)}, keepdim=True)")
        w.need(w.shape(y)[0])  # the mean of nothing is NaN
    return w.let(w.pick(f"{y} + {other}", f"{other} + {y}", f"{y} + {other}", f"torch.add({y}, {other}, alpha=0.5)",
                        f"torch.add({other}, {y}, alpha=2)", f"{y}.add_({other})"))  # fmt: skip


def twisted(w: Writer, x: str) -> str:
    """`x`, now and then with what keeps a rule from moving an op past it: a user, a write, a dropout, a view."""
    if not w.rarely():
        return x
    twist = w.pick("user", "write", "dropout", "late write", "view", "clone")
    if twist == "user":
        w.give(x)
    elif twist == "write":
        w.do(f"{x}.mul_(1.5)")
    elif twist == "late write":
        view = w.let(f"{x}.flatten()")
        w.do(f"{x}[..., :1].add_(1.0)")
        w.give(view)
    elif twist == "dropout":
        return dropped(w, x)
    elif twist == "view":
        return w.let(f"{x}.view({', '.join(map(str, w.shape(x)))})")
    else:
        return w.let(f"{x}.clone()")
    return x


def at_home(w: Writer, x: str) -> str:
    """`x` in the model's dtype, which operands may have promoted it from."""
    return x if w.draft.values[x].dtype == w.dtype else w.let(f"{x}.to({w.dtype})")
