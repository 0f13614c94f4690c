"""A Program as a drawing, in DOT text.

Reading a drawing: one box per op with its name, its result's dtype and shape, and the constants that it reads; boxes
are framed by module; the fill says what kind of op it is (the legend lists the kinds present); a thick red border marks
the nodes that the last pass made. Hovering over a box in the SVG shows the whole call.

An if or a loop is a diamond in a frame, with a frame for each part that it may run. Ellipses are the values that a part is
given; boxes at the lower edge are what comes out, with an arrow from each part. Dashed arrows lead to the next round; dotted
ones from an op that changes a list or tensor in place to the ops that read it afterwards.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from graphviz import Digraph, escape
from torch import fx

from ir_tools.ir.dialect import nodes_in
from ir_tools.ir.program import Program, all_nodes
from ir_tools.visualize.arrows import write_edges, write_order, write_region_edges
from ir_tools.visualize.boxes import INPUT, Boxes
from ir_tools.visualize.control import is_result, is_value, is_whole
from ir_tools.visualize.values import Values

LARGE = 400
"""Ops above which layout settings trade beauty for time."""


def to_dot(program: Program, *, title: str = "", new_nodes: Collection[str] = frozenset()) -> str:
    """The DOT text of `program`. `new_nodes`: names of nodes to mark as made by the last pass.

    Takes time linear in the size of the graph. Constants are lines in the boxes that read them, not boxes.
    """
    dot = Digraph("program")
    dot.attr(rankdir="TB", label=escape(title), labelloc="t", fontname="Helvetica", fontsize="12", tooltip=" ")
    if len(program) > LARGE:
        dot.attr(nslimit="1", nslimit1="1", mclimit="0.3", splines="polyline")
    dot.attr("node", shape="box", style="rounded,filled", fontname="Helvetica", fontsize="10", margin="0.2,0.06")
    dot.attr("edge", fontname="Helvetica", fontsize="8", color="#495057", arrowsize="0.7")
    if any(map(is_whole, program.calls)):
        dot.attr(compound="true")

    writer = Boxes(program, new_nodes)
    names = [spec.name for spec in program.signature.inputs]
    placeholders = program.placeholders
    for node, name in zip(placeholders, names + [n.name for n in placeholders[len(names) :]], strict=False):
        label = f"input\\n{escape(name)}\\n{escape(writer.values.of(node))}"
        dot.node(node.name, label, shape="invhouse", style="filled", fillcolor=INPUT, tooltip=escape(name))
    writer.graph(program.nodes, dot)
    for node in program.graph.find_nodes(op="output"):
        _write_output(node, dot, writer.values)
    for node in all_nodes(program.graph):
        if is_whole(node):
            write_region_edges(node, dot)
        elif node.op == "call_function" and is_value(node) and not is_result(node):
            write_edges(node, dot)
    write_order(program.graph, dot)
    writer.legend(dot)
    return dot.source


def _write_output(node: fx.Node, dot: Digraph, described: Values) -> None:
    values: list[Any] = list(nodes_in(node.args))
    facts = "\\n".join(escape(described.of(v)) for v in values[:8])
    more = f"\\n… {len(values) - 8} more" if len(values) > 8 else ""
    dot.node(node.name, f"output\\n{facts}{more}", shape="house", style="filled", fillcolor=INPUT, tooltip="output")
    for i, value in enumerate(values):
        if is_value(value):
            dot.edge(value.name, node.name, label=str(i) if len(values) > 1 else None)
