"""The pieces that emitted text is put together from: calls, statements, methods, and all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from ir_tools.emit.hoisting import Hoisted
from ir_tools.ir.provenance import location, record

UNREAD = "_unread"
"""The attribute that a tensor variable holds on a path where it is not read."""


@dataclass(frozen=True)
class Call:
    """A call that the text makes: the full name of the overload, or of our method, that it must resolve to.

    `inside`: it stands in a region, where TorchScript drops what is never read.
    """

    node: fx.Node
    text: str
    expected: str
    inside: bool = False


@dataclass(frozen=True)
class Statement:
    """One node in a chunk, in one line; a region has as many as it needs."""

    lines: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    calls: tuple[Call, ...] = ()


@dataclass
class EmittedText:
    """Everything that emission writes. `methods` and `chunks` go by method name, `paths` by constant."""

    paths: dict[str, tuple[str, ...]]
    hoisted: Hoisted = field(default_factory=Hoisted)
    floats: dict[str, float] = field(default_factory=dict)
    unread: bool = False
    methods: dict[str, str] = field(default_factory=dict)
    chunks: dict[str, list[Statement]] = field(default_factory=dict)


def method_text(name: str, arguments: list[str], result: str, lines: list[str]) -> str:
    return f"def {name}({', '.join(['self', *arguments])}) -> {result}:\n" + "".join(f"    {line}\n" for line in lines)


def indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def comment(node: fx.Node) -> str:
    path = location(node) if record(node).captured.module else ""
    return f"  # {path}" if path and path.isprintable() else ""
