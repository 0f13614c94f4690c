"""The networkx view of a Block: graph questions (cuts, components, longest paths) are asked here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import networkx as nx
from torch import fx

from ir_tools.ir.program import Block


def dataflow(program: Block) -> nx.DiGraph:
    """A `DiGraph` whose nodes are the Block's fx nodes (constants left out) and whose edges run from value to user."""
    graph: nx.DiGraph = nx.DiGraph()
    for node in program.nodes:
        if node.op == "get_attr":
            continue
        graph.add_node(node)
        graph.add_edges_from((n, node) for n in node.all_input_nodes if n.op != "get_attr")
    return graph


@dataclass
class Subgraph:
    """A connected set of ops. `entries`: values read from outside; `exits`: values that are read outside."""

    nodes: set[fx.Node]
    entries: list[fx.Node]
    exits: list[fx.Node]

    def users_of(self, value: fx.Node) -> list[fx.Node]:
        """The users of a stub on `value`: those inside for an entry, those outside for an exit."""
        inside = value not in self.nodes
        return [user for user in value.users if (user in self.nodes) is inside]


def subgraphs(program: Block, belongs: Callable[[fx.Node], bool]) -> list[Subgraph]:
    """The connected subgraphs of the ops for which `belongs` holds, in order of execution."""
    graph = dataflow(program)
    order = {node: i for i, node in enumerate(program.nodes)}
    members = graph.subgraph([n for n in graph if n.op == "call_function" and belongs(n)])
    found = []
    for component in nx.weakly_connected_components(members):
        nodes = sorted(component, key=order.__getitem__)
        entries = dict.fromkeys(n for node in nodes for n in graph.predecessors(node) if n not in component)
        exits = [n for n in nodes if any(user not in component for user in graph.successors(n))]
        found.append(Subgraph(set(component), list(entries), exits))
    return sorted(found, key=lambda subgraph: min(order[n] for n in subgraph.nodes))


def upstream(program: Block, starts: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """The ops that lead to an op for which `starts` holds, over ops for which `through` holds only; without the starts."""
    first = {node for node in program.calls if starts(node)}
    if not first:
        return set()
    graph = dataflow(program)
    reached = graph.subgraph([n for n in graph if n in first or (n.op == "call_function" and through(n))]).copy()
    reached.add_edges_from((node, "end") for node in first)
    return set(nx.ancestors(reached, "end")) - first
