"""The networkx view of a Program: graph questions (cuts, components, longest paths) are asked here."""

from __future__ import annotations

import networkx as nx

from ir_tools.ir.program import Program


def dataflow(program: Program) -> nx.DiGraph:
    """A `DiGraph` whose nodes are the Program's fx nodes (constants left out) and whose edges run from value to reader."""
    graph: nx.DiGraph = nx.DiGraph()
    for node in program.nodes:
        if node.op == "get_attr":
            continue
        graph.add_node(node)
        graph.add_edges_from((n, node) for n in node.all_input_nodes if n.op != "get_attr")
    return graph
