"""Regions: control flow on runtime values, as nodes whose arguments hold whole graphs.

    region_if(condition, then, orelse, operands)                ->  results of the body taken
    region_loop(trips, condition, body, carried, operands)      ->  carried values after the last round

A `Body` is a graph whose placeholders are, for an if, the operands, and for a loop the number of the round, the carried
values and the operands; its output is a tuple of results (for a loop: whether to go on, then the carried values). Runtime
values enter as operands, constants by name from the table of the Program, so that folding works inside. Bodies are
immutable: a pass that changes one makes a new Body and a new node.

The loop is TorchScript's: `round = 0; while condition and round < trips: ...; round += 1`; `trips` None is no limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Effects:
    """What running a body does to what it can reach. Numbers are those of its placeholders.

    `written`: tensors that it writes into. `changed`: containers that it changes. `escaping`: what its results, or the
    containers that it changes, may share memory with. `written_constants`, `escaping_constants`: the same for constants, by
    name. `acts`: it may raise, draws random numbers, writes into constants, or loops, so that it must run whether or not its
    results are read. `random`: it draws.
    """

    written: frozenset[int] = frozenset()
    changed: frozenset[int] = frozenset()
    escaping: frozenset[int] = frozenset()
    written_constants: frozenset[str] = frozenset()
    escaping_constants: frozenset[str] = frozenset()
    acts: bool = False
    random: bool = False

    @property
    def matter(self) -> bool:
        """Running the body could be noticed, whether or not its results are read."""
        return self.acts or bool(self.written or self.changed)


@dataclass(frozen=True)
class Outside:
    """What the graph around does to the inputs and results of a body: ("input", 2) is its third placeholder.

    `written`, `changed`: tensors that the graph around writes into, containers that it changes. `carried`: how many values a
    loop passes to its next round, which may write into them.
    """

    written: frozenset[tuple[str, int]] = frozenset()
    changed: frozenset[tuple[str, int]] = frozenset()
    carried: int = 0


NOBODY = Outside()
"""Of a whole Program: there is no graph around it."""


@dataclass(frozen=True, eq=False)
class Body:
    """One block of a region; the names of its nodes begin with `name`."""

    graph: fx.Graph
    effects: Effects
    name: str

    @property
    def placeholders(self) -> list[fx.Node]:
        return self.graph.find_nodes(op="placeholder")

    @property
    def results(self) -> Sequence[Any]:
        return self.graph.output_node().args[0]  # type: ignore[return-value]

    def __repr__(self) -> str:
        return f"<body of {len(self.graph.nodes)} nodes>"


Run = Callable[[Body, list[Any]], list[Any]]


def region_if(condition: Any, then: Body, orelse: Body, operands: Sequence[Any], *, run: Run) -> list[Any]:
    """Run one of two bodies on the operands; `run(body, inputs)` gives a body's results."""
    return run(then if condition else orelse, list(operands))


def region_loop(
    trips: Any, condition: Any, body: Body, carried: Sequence[Any], operands: Sequence[Any], *, run: Run
) -> list[Any]:
    """Run a body until its first result, or `condition` at first, is false, at most `trips` times."""
    values, count = list(carried), 0
    while condition and (trips is None or count < trips):
        condition, *values = run(body, [count, *values, *operands])
        count += 1
    return values


REGIONS = frozenset({region_if, region_loop})


def is_region(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in REGIONS


def bodies(node: fx.Node) -> list[Body]:
    """The bodies of a region node, in order."""
    return [a for a in tuple[Any, ...](node.args) if isinstance(a, Body)]


def inputs_of(node: fx.Node) -> list[Any]:
    """What a region's bodies are given at first, one per placeholder (None for the number of a loop's round)."""
    if node.target is region_if:
        return list(node.args[3])  # type: ignore[arg-type]
    return [None, *node.args[3], *node.args[4]]  # type: ignore[misc]


def all_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The nodes of a graph and of the bodies in it, each region before what is in it."""
    for node in graph.nodes:
        yield node
        if is_region(node):
            for body in bodies(node):
                yield from all_nodes(body.graph)


def with_bodies(node: fx.Node, new: Sequence[Body]) -> tuple[Any, ...]:
    """The arguments of a region node with other bodies."""
    replacements = iter(new)
    return tuple(next(replacements) if isinstance(a, Body) else a for a in node.args)
