"""Phrases of values computed twice, from constants alone, or without a use."""

from __future__ import annotations

from passes.testing.phrases.layers import call
from passes.testing.writer import Writer


def same_twice(w: Writer) -> None:
    """One expression twice, with nothing between, or a write, or of random numbers."""
    x = w.value(2, 3, 4)
    expression = w.pick("torch.exp(-{}.abs())", "{} * 2", "torch.softmax({}, -1)", "{}.transpose(0, 1).contiguous()",
                        "torch.relu({})", "{}.sum(-1, keepdim=True)", "torch.rand_like({})",
                        "F.dropout({}, 0.5, training=True)", "module")  # fmt: skip
    if expression == "module":
        expression = w.make("linear", call("nn.Linear", w.shape(x)[-1], 3)) + "({})"
    between = w.pick("nothing", "nothing", "write", "write to result", "swap")
    x = w.let(f"{x}.clone()") if between == "write" else x
    a = w.let(expression.format(x))
    if between == "write":
        w.do(f"{x}.mul_(0.5)")
    elif between == "write to result":
        w.do(f"{a}.add_(1.0)")
    b = w.let(expression.format(x))
    if w.rarely():
        w.give(a, b)
        return
    w.give(w.let(f"{a} + {b} * 3") if w.flip() else w.let(f"torch.cat([{a}, {b}])"))


def same_twice_swapped(w: Writer) -> None:
    """a + b and b + a, a * b and b * a: equal bit by bit, though not always in one memory layout; a - b and b - a are not."""
    x = w.value(2, 3, 4)
    y = w.new_input(*w.shape(x)) if w.flip() else w.let(f"torch.tanh({x})")
    op = w.pick("+", "*", "-")
    a, b = w.let(f"{x} {op} {y}"), w.let(f"{y} {op} {x}")
    w.give(*((a, b) if w.rarely() else [w.let(f"{a} * 2 + {b}")]))


def computed_constant(w: Writer) -> None:
    """A value computed from buffers alone, added to a runtime value."""
    x = w.value(2, 3, 4)
    n = w.shape(x)[-1]
    a = w.buffer(f"torch.randn({n})")
    made = w.pick(f"torch.exp({a}.tanh()) + 1", f"torch.arange({n}, dtype={w.dtype}) * 0.5", f"{a}.softmax(0).cumsum(0)",
                  f"torch.ones({n}, dtype={w.dtype}).sqrt()", f"torch.rand({n}, dtype={w.dtype})")  # fmt: skip
    kind = w.pick("plain", "plain", "plain", "plain", "written", "large")
    constant = w.let(f"torch.arange(140000, dtype={w.dtype})[:{n}] * 0.5" if kind == "large" else made)
    if kind == "written":
        w.do(f"{constant}.mul_(0.5)")
    w.give(w.let(f"{x} {w.pick('+', '*', '-')} {constant}"))


def dead_code(w: Writer) -> None:
    """Values without users. (No random ones: torch.jit.trace drops them, and what is random later gets other numbers.)"""
    x = w.value(2, 3, 4)
    w.let(w.pick(f"torch.sin({x}) * 2", f"{x}.exp()", f"{x}.sum(0)"))
    if w.flip():
        dead = w.let(f"{x}.clone()")
        w.do(f"{dead}.zero_()")
    w.give(w.let(w.pick(f"torch.cos({x})", f"{x} + torch.rand_like({x})")))
