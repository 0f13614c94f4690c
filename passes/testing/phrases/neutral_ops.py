"""Phrases of ops that give their operand back (x * 1, x + 0, -(-x), ...), and of near misses."""

from __future__ import annotations

from passes.testing.phrases.operands import at_home
from passes.testing.writer import Writer

NEUTRAL: dict[str, tuple[str, ...]] = {
    "times one": ("{} * 1", "{} / 1", "1 * {}", "{} * 1.0", "{} / 1.0", "{} * torch.ones_like({})"),
    "power": ("{} ** 1", "{}.pow(1)", "torch.pow({}, 1.0)"),
    "plus zero": ("{} - 0", "{} + -0.0", "-0.0 + {}", "{} - 0.0", "{} + 0", "0 + {}", "{} + torch.zeros_like({})"),
    "copy": ("torch.cat([{}])", "{}[:]", "{}.contiguous()", "{}.to({}.dtype)", "{}.clone()", "{}.expand({}.shape)",
             "{}.repeat({ones})"),
    "padded": ("F.pad({}, (0, 0))", "F.pad({}, (0, 0, 0, 0))", "F.pad({}, [0, 0], value=2.0)"),
    "undone": ("{}.neg().neg()", "-(-{})"),
    "again": ("torch.relu(torch.relu({}))", "{}.abs().abs()", "{}.clamp(-1.0, 1.5).clamp(-1.0, 1.5)",
              "F.hardtanh(F.hardtanh({}, -0.5, 2.0), -0.5, 2.0)", "{}.clamp(min=-0.5).clamp(min=-0.5)",
              "{}.clamp(-1.0, 1.5).clamp(-1.0, 2.0)"),
    "permuted": ("{}.permute({order})", "{}.transpose(0, 0)", "{}.transpose(-1, -1)", "{}.permute({order})"),
    "permuted twice": ("{}.transpose(0, -1).transpose(0, -1)",),
    "reshaped": ("{}.reshape({}.shape)", "{}.flatten().view({}.shape)", "{}.unsqueeze(1).flatten(0, 1)",
                 "{}.unsqueeze(0).squeeze(0)", "{}.reshape(-1, 1).reshape({}.shape)"),
    "near": ("0 - {}", "{}.mul(-1).mul(-1)", "1 / {}.abs().add(1)", "{}.tanh().pow(2)", "F.relu6(torch.relu({}))",
             "torch.stack([{}])[0]", "{}.sigmoid().relu()", "{}.tanh().exp().abs()", "{}.float().double()",
             "{}.clamp(-3.4028234e38, 3.4028234e38)"),
}  # fmt: skip
"""Expressions that give their operand back, or nearly, by what they are."""


def given_back(w: Writer, x: str, template: str) -> str:
    """The value of a template of `NEUTRAL`, whose braces stand for `x`; it has the shape of `x`."""
    order, ones = ", ".join(map(str, range(w.rank(x)))), ", ".join("1" * w.rank(x))
    y = w.let(template.replace("{order}", order).replace("{ones}", ones).replace("{}", x))
    w.need(w.shape(y) == w.shape(x))
    return y


def neutral(w: Writer) -> None:
    """x * 1, x + 0, x ** 1, cat of one, transposed twice, ...: and near misses."""
    x = w.value(2, 3, 4, 1)
    for _ in range(w.pick(3, 2, 4, 1)):
        x = given_back(w, x, w.pick(*NEUTRAL[w.pick(*NEUTRAL, "power")]))
        if w.rarely():
            x = w.let(f"torch.sin({x})")  # so that not all of it falls away
    w.give(at_home(w, x))


def neutral_discrete(w: Writer) -> None:
    """The same of integers, of truth values and of rounded numbers. Of an input: elsewhere rounding errors would grow to 1."""
    x = w.new_input(2, w.pick(4, 3), *([5] if w.flip() else []))
    kind = w.pick("integers", "truth", "rounded")
    templates: tuple[str, ...]
    if kind == "integers":
        x = w.let(f"{x}.mul(3).to(torch.{w.pick('int64', 'int32')})")
        templates = ("{}.bitwise_not().bitwise_not()", "{} + 0", "0 + {}", "{} - 0", "{} * 1", "{} ** 1", "-(-{})",
                     "{}.clone()", "{}.sign().sign()", "{}.clamp(-2, 2).clamp(-2, 2)", "torch.add({}, 0, alpha=2)")  # fmt: skip
    elif kind == "truth":
        x = w.let(f"{x} > 0.1")
        templates = ("{}.logical_not().logical_not()", "torch.bitwise_not(torch.bitwise_not({}))", "~(~{})", "{}.clone()")
    else:
        templates = ("torch.ceil(torch.ceil({}))", "{}.floor().floor()", "{}.round().round()", "{}.trunc().trunc()",
                     "torch.sign(torch.sign({}))", "{}.round(decimals=1).round(decimals=1)", "{}.ceil().floor()")  # fmt: skip
    for _ in range(w.pick(2, 1, 3)):
        x = given_back(w, x, w.pick(*templates))
    w.give(at_home(w, x))


def neutral_complex(w: Writer) -> None:
    """Complex numbers times one, plus zero, to the power of one, negated twice; and real again."""
    x = w.value(2, 3, 4)
    z = w.let(w.pick(f"torch.complex({x}, torch.tanh({x}))", f"torch.view_as_complex(torch.stack([{x}, {x} * 0.5], -1))"))
    for _ in range(w.pick(2, 1, 3)):
        z = given_back(w, z, w.pick("{} * 1", "{} + 0", "{} ** 1", "{} - 0", "{} / 1", "-(-{})", "{}.clone()", "0 + {}"))
    y = w.let(w.pick(f"{z}.real + {z}.imag", f"torch.view_as_real({z}).sum(-1)", f"torch.view_as_real({z}).flatten(-2)"))
    w.give(w.let(f"torch.tanh({y})"))
