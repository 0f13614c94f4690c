"""Dataflow: one sweep gives each value what its operands, or its users, say of it."""

from __future__ import annotations

from collections.abc import Iterator
from operator import add, or_

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from ir_tools.ir import Program
from ir_tools.ir.dataflow import backward, forward, upstream
from ir_tools.ir.dialect import short_name
from ir_tools.ir.view import dataflow
from tests.check import captured

STEPS = st.lists(st.tuples(st.sampled_from(["relu", "sin", "neg", "add"]), st.integers(0, 9), st.integers(0, 9)), max_size=9)


class Drawn(nn.Module):
    """Values made one after the other, each from earlier ones; all are returned."""

    def __init__(self, steps: list[tuple[str, int, int]]):
        super().__init__()
        self.steps = steps
        self.register_buffer("w", torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x, x + self.w]
        for name, a, b in self.steps:
            one, other = values[a % len(values)], values[b % len(values)]
            values.append(one + other if name == "add" else getattr(torch, name)(one))
        return tuple(values[1:])


def drawn(steps: list[tuple[str, int, int]]) -> Program:
    return captured(Drawn(steps).eval(), torch.ones(2))


def paths(program: Program) -> nx.DiGraph:
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(program.nodes)
    graph.add_edges_from((n, node) for node in program.nodes for n in node.all_input_nodes)
    return graph


def operands(program: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    yield from ((node, n) for node in program.nodes for n in node.all_input_nodes)


@given(STEPS)
def test_forward_reads_operands_and_backward_users(steps: list[tuple[str, int, int]]) -> None:
    program = drawn(steps)
    graph = paths(program)
    depth = forward(program, lambda node, known: 1 + max((known[n] for n in node.all_input_nodes), default=0))
    height = backward(program, lambda user, value, known: known + 1, max, 1)
    assert list(depth) == program.nodes and set(height) == set(program.nodes)
    for node in program.nodes:
        above, below = (graph.subgraph({node, *found}) for found in (nx.ancestors(graph, node), nx.descendants(graph, node)))
        assert depth[node] == 1 + nx.dag_longest_path_length(above)
        assert height[node] == 1 + nx.dag_longest_path_length(below)


@given(STEPS)
def test_backward_joins_what_all_users_say(steps: list[tuple[str, int, int]]) -> None:
    """The number of paths to the output, as a sensitivity would be summed."""
    program = drawn(steps)
    counted = backward(program, lambda user, value, known: 1 if user.op == "output" else known, add, 0)
    graph = paths(program)
    for node in program.nodes:
        if node.op != "output":
            assert counted[node] == len(list(nx.all_simple_paths(graph, node, program.output)))


@given(STEPS)
def test_upstream_is_what_networkx_finds(steps: list[tuple[str, int, int]]) -> None:
    program = drawn(steps)
    named = lambda *names: lambda node: short_name(node.target) in names  # noqa: E731
    starts, through = named("sin"), named("sin", "add", "relu")
    graph = dataflow(program)
    first = {node for node in program.calls if starts(node)}
    kept = graph.subgraph([n for n in graph if n.op == "call_function" and (starts(n) or through(n))])
    expected = set().union(*(nx.ancestors(kept, node) for node in first)) - first
    assert upstream(program, starts, through) == expected


def test_what_was_found_cannot_be_changed() -> None:
    program = drawn([("sin", 0, 0)])
    for known in (forward(program, lambda node, known: 0), backward(program, lambda user, value, known: True, or_, False)):
        with pytest.raises(TypeError):
            known[program.output] = 1  # type: ignore[index]


def test_a_sweep_is_linear() -> None:
    """Each edge is asked once."""
    program = drawn([("add", i, i + 1) for i in range(9)])
    asked: list[tuple[fx.Node, fx.Node]] = []
    backward(program, lambda user, value, known: asked.append((user, value)) is None, or_, False)
    assert sorted(map(str, asked)) == sorted(map(str, operands(program)))
