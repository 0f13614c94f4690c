"""Random TorchScript functions as source text: ifs, loops, lists, optionals and in-place ops on numbers that data decides.

A program is drawn statement by statement from a typed environment, so that it always compiles and always ends: every loop
has a small bound of its own, ints are kept small by `%`, and tensors by `tanh`. The text is also ordinary Python, which
serves as a second opinion of what it means, and shows which lines ran.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.branches_taken import Watch, outcomes

DEEPEST = 3
TENSOR, INT, FLOAT, BOOL, LIST, INTS, OPTIONAL, PAIR, DICT = "tensor int float bool list ints optional pair dict".split()
FILENAME = "<random program>"


@dataclass(frozen=True)
class Scope:
    """The variables that a statement may read, by type, and where it stands."""

    names: tuple[tuple[str, str], ...]
    depth: int = 0
    in_loop: bool = False
    frozen: frozenset[str] = frozenset()  # variables that a loop around counts with or walks over: not to be written

    def of(self, kind: str) -> list[str]:
        return [name for name, its_kind in self.names if its_kind == kind]

    def writable(self, kind: str) -> list[str]:
        return [name for name in self.of(kind) if name not in self.frozen]

    def inner(self, names: Iterable[tuple[str, str]] = (), frozen: Iterable[str] = (), in_loop: bool | None = None) -> Scope:
        return replace(
            self,
            names=(*self.names, *names),
            depth=self.depth + 1,
            in_loop=self.in_loop if in_loop is None else in_loop,
            frozen=self.frozen | set(frozen),
        )


@dataclass
class Writer:
    """Draws a program. Fresh names are numbered, so that no loop counter is ever written by a statement inside the loop."""

    draw: Any
    used: int = 0
    statements: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def fresh(self, letter: str) -> str:
        self.used += 1
        return f"{letter}{self.used}"

    def choose(self, options: Iterable[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    # -- expressions ------------------------------------------------------------------------------------------------------

    def tensor(self, scope: Scope) -> str:
        a, b, c = (self.choose(scope.of(TENSOR)) for _ in range(3))
        f, n, xs, pair, d = (self.choose(scope.of(kind)) for kind in (FLOAT, INT, LIST, PAIR, DICT))
        return self.choose([
            a, f"torch.tanh({a} + {b})", f"torch.tanh({a} * {f})", f"{a} * 0.5 - {b} * 0.25",
            f"torch.where({a} > {b}, {a}, {c})",
            f"{a}.clamp(-1.0, {f}).tanh()", f"{a}.flip(1)", f"{a}.roll({n}, 1)", f"torch.relu({a}) - 0.5",
            f"torch.tanh({a} @ {b}.t() @ {c})", f"torch.tanh({a} + {b}[0])", f"torch.tanh({a} - {b}.mean())",
            f"{a}.t().contiguous().view(2, 3)", f"torch.tanh({a}[:{n} % 2 + 1].sum(0) + {b})", f"torch.full_like({a}, {f})",
            f"torch.tanh(torch.ones({n} % 3 + 1, 3).sum(0) * {a})", f"torch.tanh({a} + {n})", f"{xs}[-1]",
            f"{xs}[{n} % len({xs})]", f"torch.tanh(torch.stack({xs}).sum(0))", f"torch.cat({xs})[:2]", f"{pair}[0]",
            f'{d}["k"]', f"{a}.clone()", f"{a}.softmax(1)", f"torch.zeros(2, 3) + {f}",
        ])  # fmt: skip

    def int(self, scope: Scope) -> str:
        n, m = (self.choose(scope.of(INT)) for _ in range(2))
        t, xs, ns, pair, f = (self.choose(scope.of(kind)) for kind in (TENSOR, LIST, INTS, PAIR, FLOAT))
        return self.choose([
            str(self.draw(st.integers(0, 3))), n, f"({n} + {m}) % 5", f"{n} * 2 % 7", f"{n} - {m}", f"{n} // 2", f"len({xs})",
            f"int({t}.sum() * 3.0) % 4", f"int(({t} > 0.0).sum())", f"int({t}.argmax())", f"{t}.size(1)", f"min({n}, {m})",
            f"{ns}[-1]", f"len({ns})", f"abs({n}) % 3", f"int({f}) % 3", f"{pair}[1] % 4",
        ])  # fmt: skip

    def float(self, scope: Scope) -> str:
        f, n, t = (self.choose(scope.of(kind)) for kind in (FLOAT, INT, TENSOR))
        number = str(self.choose([-0.75, -0.1, 0.0, 0.3, 0.9]))
        return self.choose([number, f, f"{f} * 0.5", f"float({t}.mean())", f"float({n} % 3)", f"{t}.max().item() + 0.0",
                            f"min({f}, {number})", f"{f} - {number}", f"float(torch.sigmoid({t}[0, 0]))"])  # fmt: skip

    def bool(self, scope: Scope, deep: bool = True, implicit: bool = True) -> str:
        """A condition; `implicit`: one that is a tensor will do, as it does for an if."""
        t, other, n, m, f, b, xs = (
            self.choose(scope.of(kind)) for kind in (TENSOR, TENSOR, INT, INT, FLOAT, BOOL, LIST)
        )
        c = str(self.choose([-0.5, -0.1, 0.0, 0.2]))
        options = [
            f"bool({t}.sum() > {c})", f"bool({t}.mean() < {other}.mean() + {c})", f"bool(({t} > {c}).all())",
            f"bool(({t} > 0.6).any())", f"{t}[0, 1] < {c}" if implicit else f"bool({t}[0, 1] < {c})",
            f"{n} > {m}", f"{n} % 2 == 0", f"{f} < {c}", b, f"not {b}", f"len({xs}) > 2",
        ]  # fmt: skip
        if deep:
            parts = self.bool(scope, False, implicit), self.choose(["and", "or"]), self.bool(scope, False, implicit)
            options += [" ".join(parts)] * 2
        return self.choose(options)

    def value(self, kind: str, scope: Scope) -> str:
        if kind == PAIR:
            return f"({self.tensor(scope)}, {self.int(scope)})"
        if kind == BOOL:
            return self.bool(scope, implicit=False)
        return {TENSOR: self.tensor, INT: self.int, FLOAT: self.float}[kind](scope)

    # -- statements -------------------------------------------------------------------------------------------------------

    def block(self, scope: Scope, most: int = 3) -> list[str]:
        lines: list[str] = []
        for _ in range(self.draw(st.integers(1, most))):
            new, scope = self.statement(scope)
            lines += new
        return lines

    def statement(self, scope: Scope) -> tuple[list[str], Scope]:
        """A statement's lines, and the scope after it."""
        self.statements += 1
        simple = [self.assign, self.assign, self.new_variable, self.in_place, self.on_list, self.on_container, self.swap,
                  self.on_optional]  # fmt: skip
        compound = [self.if_, self.if_, self.for_, self.while_, self.define_in_both]
        leaving = [self.leave] * 2 if scope.in_loop else []
        if scope.depth < DEEPEST and self.statements < 30:
            simple += compound * (3 if scope.depth == 0 else 2)
        write = self.choose([*simple, *leaving, self.early_return])
        self.kinds[write.__name__] += 1
        return write(scope)

    def assign(self, scope: Scope) -> tuple[list[str], Scope]:
        kind = self.choose([TENSOR, TENSOR, TENSOR, INT, FLOAT, BOOL, PAIR])
        name, value = self.choose(scope.writable(kind)), self.value(kind, scope)
        if kind == INT and self.draw(st.booleans()):
            return [f"{name} += 1"], scope
        return [f"{name} = {value}"], scope

    def new_variable(self, scope: Scope) -> tuple[list[str], Scope]:
        kind = self.choose([TENSOR, INT, FLOAT, BOOL])
        name, value = self.fresh(kind[0]), self.value(kind, scope)
        return [f"{name} = {value}"], replace(scope, names=(*scope.names, (name, kind)))

    def in_place(self, scope: Scope) -> tuple[list[str], Scope]:
        a, b, f = self.choose(scope.of(TENSOR)), self.choose(scope.of(TENSOR)), self.choose(scope.of(FLOAT))
        n = self.choose(scope.of(INT))
        return [self.choose([
            f"{a}.mul_(0.5)", f"{a}.add_(0.25)", f"{a}.tanh_()", f"{a}.neg_()", f"{a}.clamp_(-1.0, 1.0)",
            f"{a}[0].mul_({f}).tanh_()", f"{a}[:, 1] = 0.5", f"{a}[{n} % 2] = {b}[0].clone()",
            f"{a} += torch.tanh({b})", f"{a}.copy_({b}.clone())",
            f"{a}.view(-1)[{n} % 6] = 0.75", f"{self.choose(scope.of(LIST))}[-1].mul_(0.5)", f"{a}[:, :{n} % 3].zero_()",
        ])], scope  # fmt: skip

    def on_list(self, scope: Scope) -> tuple[list[str], Scope]:
        t, n, ns = self.tensor(scope), self.choose(scope.of(INT)), self.choose(scope.of(INTS))
        free = scope.writable(LIST)
        if not free:
            return [f"{ns}.append({n})"], scope
        xs = self.choose(free)
        return [self.choose([
            f"{xs}.append({t})", f"{xs}.append({t})", f"{xs} = {xs} + [{t}]", f"{xs} = [{t}, {t}]", f"{xs}[-1] = {t}",
            f"{xs}[{n} % len({xs})] = {t}", f"{xs} = {xs}[-2:]", f"{ns}.append({n})", f"{xs}.insert(0, {t})",
        ])], scope  # fmt: skip

    def on_container(self, scope: Scope) -> tuple[list[str], Scope]:
        d, t, pair = self.choose(scope.of(DICT)), self.tensor(scope), self.choose(scope.writable(PAIR))
        into, number = self.choose(scope.writable(TENSOR)), self.choose(scope.writable(INT))
        return [self.choose([f'{d}["k"] = {t}', f'{d}["other"] = {t}', f"{into}, {number} = {pair}",
                             f"{pair} = ({t}, {pair}[1])"])], scope  # fmt: skip

    def swap(self, scope: Scope) -> tuple[list[str], Scope]:
        kind = self.choose([TENSOR, INT])
        a, b = (self.choose(scope.writable(kind)) for _ in range(2))
        return [f"{a}, {b} = {b}, {a}"], scope

    def on_optional(self, scope: Scope) -> tuple[list[str], Scope]:
        o, t, value = self.choose(scope.of(OPTIONAL)), self.choose(scope.writable(TENSOR)), self.tensor(scope)
        condition = self.bool(scope, False)
        some = f"{o} = {value} if {condition} else None"  # a bare tensor would narrow the variable's type to Tensor
        return self.choose([
            [some],
            [f"{o} = None if {condition} else {o}"],
            [f"if {o} is None:", "    " + some, "else:", f"    {t} = torch.tanh({t} + {o})"],
            [f"if {o} is not None:", f"    {t} = {o} * 0.5"],
        ]), scope  # fmt: skip

    def if_(self, scope: Scope) -> tuple[list[str], Scope]:
        lines = [f"if {self.bool(scope)}:", *indented(self.block(scope.inner()))]
        if self.draw(st.booleans()):
            lines += [f"elif {self.bool(scope)}:", *indented(self.block(scope.inner(), 2))]
        if self.draw(st.booleans()):
            lines += ["else:", *indented(self.block(scope.inner(), 2))]
        return lines, scope

    def define_in_both(self, scope: Scope) -> tuple[list[str], Scope]:
        """A variable that is new in both branches, and lives on after them."""
        kind = self.choose([TENSOR, INT, FLOAT])
        name = self.fresh(kind[0])
        lines = [f"if {self.bool(scope)}:", *indented(self.block(scope.inner(), 1)), f"    {name} = {self.value(kind, scope)}"]
        lines += ["else:", f"    {name} = {self.value(kind, scope)}"]
        return lines, replace(scope, names=(*scope.names, (name, kind)))

    def for_(self, scope: Scope) -> tuple[list[str], Scope]:
        i, t = self.fresh("i"), self.choose(scope.of(TENSOR))
        n, xs = self.choose(scope.of(INT)), self.choose(scope.of(LIST))
        over = self.choose([
            "range(2)", "range(3)", f"range({t}.size(0))", f"range({n} % 4)", f"range(int(({t} > 0.0).sum()) % 4)",
            f"range({n} % 3, 4)", f"range(len({xs}))", "range(3, 0, -1)", f"enumerate({xs}[-3:])", f"{xs}[:3]",
        ])  # fmt: skip
        if over.startswith("range"):
            inner = scope.inner([(i, INT)], in_loop=True)
            assigned = [f"{i} = {i} + 1"] if self.draw(st.integers(0, 5)) == 5 else []
            shown = i
        else:
            e, assigned = self.fresh("e"), []
            inner = scope.inner([(i, INT), (e, TENSOR)] if over.startswith("enum") else [(e, TENSOR)], in_loop=True)
            shown = f"{i}, {e}" if over.startswith("enum") else e
        if "len(" in over:
            inner = replace(inner, frozen=inner.frozen | {xs})
        return [f"for {shown} in {over}:", *indented([*assigned, *self.block(inner)])], scope

    def while_(self, scope: Scope) -> tuple[list[str], Scope]:
        w, bound = self.fresh("w"), self.draw(st.integers(1, 4))
        inner = scope.inner([(w, INT)], [w], in_loop=True)
        if self.draw(st.integers(0, 3)) == 3:
            head = ["while True:", f"    {w} += 1", f"    if {w} > {bound} or {self.bool(scope, False)}:", "        break"]
        else:
            head = [f"while {w} < {bound} and {self.bool(scope, False)}:", f"    {w} += 1"]
        return [f"{w} = 0", *head, *indented(self.block(inner))], scope

    def leave(self, scope: Scope) -> tuple[list[str], Scope]:
        word = self.choose(["break", "continue"])
        lines = self.block(replace(scope.inner(), depth=DEEPEST, in_loop=False), 1) if self.draw(st.booleans()) else []
        return [f"if {self.bool(scope)}:", *indented([*lines, word])], scope

    def early_return(self, scope: Scope) -> tuple[list[str], Scope]:
        # Rarely, or nothing that follows would ever run.
        condition = f"bool({self.choose(scope.of(TENSOR))}.sum() > 3.0)"
        result = f"({self.tensor(scope)}, {self.tensor(scope)}, {self.choose(scope.of(INT))} + x)"
        return [f"if {condition}:", f"    return {result}"], scope


# Variables that a program starts with: name, type, first value, and how they enter the result. A program that does not
# mention one goes without it, so that a failing program gets small.
ALWAYS = ["x1 = torch.tanh(x)", "y1 = torch.tanh(y) * 0.9"]
STATE = (
    ("n0", INT, "n0 = x.size(0)", "numbers", "n0"),
    ("k0", INT, "k0 = int((x1 > 0.0).sum()) % 4", "numbers", "k0"),
    ("f0", FLOAT, "f0 = 0.5", "numbers", "f0"),
    ("g0", FLOAT, "g0 = float(y1.mean())", "numbers", "g0"),
    ("b0", BOOL, "b0 = bool(x1.sum() > y1.sum())", "numbers", "int(b0)"),
    ("ns", INTS, "ns: List[int] = [1]", "numbers", "len(ns) + ns[-1]"),
    ("xs", LIST, "xs: List[Tensor] = [x1]", "tensors", "torch.stack(xs).sum(0)"),
    ("ys", LIST, "ys: List[Tensor] = [y1, x1 * 0.5]", "tensors", "torch.stack(ys).sum(0)"),
    ("o", OPTIONAL, "o: Optional[Tensor] = None", "tensors", "(x1 if o is None else o)"),
    ("p", PAIR, "p = (y1 * 0.25, 1)", "tensors", "p[0] + p[1]"),
    ("d", DICT, 'd: Dict[str, Tensor] = {"k": x1}', "tensors", 'd["k"]'),
)
NAMES = (("x1", TENSOR), ("y1", TENSOR), *((name, kind) for name, kind, *_ in STATE))
HEAD = "def forward(self, x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor, Tensor]:"


def indented(lines: Iterable[str]) -> list[str]:
    return ["    " + line for line in lines]


@dataclass
class RandomProgram:
    """The text of a `forward(self, x, y)` over two float tensors of shape (2, 3), which returns three."""

    text: str
    kinds: Counter[str]

    def __repr__(self) -> str:  # what hypothesis prints
        return self.text

    def script(self) -> torch.jit.ScriptModule:
        # A class of its own: methods are defined on the class, which equal modules (and all `ScriptModule()`) share.
        module = torch.jit.script(type("RandomProgram", (torch.nn.Module,), {})().eval())
        module.define(self.text)
        return module

    def python(self) -> Any:
        """The same text as an ordinary function of x and y."""
        names: dict[str, Any] = {}
        exec("import torch\nfrom torch import Tensor\nfrom typing import Dict, List, Optional, Tuple", names)
        exec(compile(self.text, FILENAME, "exec"), names)
        forward = names["forward"]
        return lambda x, y: forward(None, x, y)

    def outcomes(self, calls: Iterable[tuple[Tensor, Tensor]]) -> dict[tuple[int, str], tuple[bool, bool]]:
        """(line, "If" or "While") -> whether it was ever true, and ever false, on these calls, run by Python."""
        with Watch(FILENAME) as watch:
            for x, y in calls:
                self.python()(x.clone(), y.clone())
        return outcomes(ast.parse(self.text), 1, watch.steps)


@st.composite
def programs(draw: st.DrawFn) -> RandomProgram:
    writer = Writer(draw)
    scope = Scope(NAMES)
    body: list[str] = []
    for _ in range(draw(st.integers(3, 6))):
        lines, scope = writer.statement(scope)
        body += lines
    return RandomProgram(written(body), writer.kinds)


def written(body: list[str]) -> str:
    """The whole function: the variables that the body mentions, the body, and all of them in the result."""
    words = set(re.findall(r"\w+", "\n".join(body)))
    used = [row for row in STATE if row[0] in words]
    tensors = ["y1", *(term for *_, where, term in used if where == "tensors")]
    numbers = ["x", *(term for *_, where, term in used if where == "numbers")]
    end = f"return (torch.tanh(x1), {' + '.join(tensors)}, {' + '.join(numbers)})"
    return "\n".join([HEAD, *indented([*ALWAYS, *(row[2] for row in used), *body, end])]) + "\n"


def calls(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Inputs of several sizes and signs, so that comparisons have both outcomes."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> Tensor:
        return torch.randn(2, 3, generator=generator) + torch.randn((), generator=generator)

    return [(one(), one()) for _ in range(count)]
