"""Arrows of a drawing: from each value to the ops that read it, into and out of regions, and behind what changes a value."""

from __future__ import annotations

from graphviz import Digraph, escape
from torch import fx

from ir_tools.ir.dialect import bound_arguments, short_name
from ir_tools.ir.effects import changed_containers, written_nodes
from ir_tools.ir.regions import Body, inputs_of, is_region, region_loop
from ir_tools.torch_compat.operators import OpOverload
from ir_tools.visualize.boxes import nothing_name, part_name
from ir_tools.visualize.control import conditions, drawn, is_value, is_whole, next_value, parts, result_nodes, result_of

_COMMUTATIVE = frozenset({"add", "mul", "add_", "mul_", "maximum", "minimum"})
_NEXT_ROUND = {"style": "dashed", "constraint": "false", "color": "#d9480f", "fontcolor": "#d9480f"}
_AFTERWARDS = {"style": "dotted", "color": "#c92a2a", "fontcolor": "#c92a2a", "label": "after", "penwidth": "1.5"}


def write_edges(node: fx.Node, dot: Digraph) -> None:
    labels = _edge_labels(node)
    for source in node.all_input_nodes:
        if is_value(source):
            dot.edge(source.name, node.name, label=escape(labels[source]) if source in labels else None)


def _edge_labels(node: fx.Node) -> dict[fx.Node, str]:
    """Labels for the arrows into an op whose operands look alike in a drawing, such as `residual`."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return {}
    if len([n for n in node.all_input_nodes if is_value(n)]) < 2 or short_name(node.target) in _COMMUTATIVE:
        return {}
    roles: dict[fx.Node, list[str]] = {}
    for name, value in bound_arguments(node).items():
        if isinstance(value, fx.Node):
            roles.setdefault(value, []).append(name)
    return {n: ", ".join(names) for n, names in roles.items()}


def write_region_edges(node: fx.Node, dot: Digraph) -> None:
    """Arrows to the condition, into the parts, out of them, and to the next round."""
    for condition in filter(is_value, conditions(node)):
        dot.edge(condition.name, node.name)
    for label, body in parts(node):
        _write_entry_arrows(node, label, body, dot)
        for placeholder, given in zip(body.placeholders, inputs_of(node), strict=True):
            if not placeholder.users:
                continue
            if is_value(given):
                dot.edge(given.name, placeholder.name)
            following = next_value(node, body, placeholder)
            if is_value(following):
                dot.edge(following.name, placeholder.name, **_NEXT_ROUND)
        for number in range(len(body.results) - (node.target is region_loop)):
            value = result_of(node, body, number)
            for result in result_nodes(node, number) if is_value(value) else ():
                dot.edge(value.name, result.name, label=label if node.target is not region_loop else None)
        if node.target is region_loop and is_value(body.results[0]):
            dot.edge(body.results[0].name, node.name, label="again?", **_NEXT_ROUND)
    for number in range(len(parts(node)[0][1].results) - (node.target is region_loop)):
        if not any(is_value(result_of(node, body, number)) for _label, body in parts(node)):
            for result in result_nodes(node, number):
                dot.edge(node.name, result.name, style="invis")  # nothing else holds it below the condition


def _write_entry_arrows(node: fx.Node, label: str, body: Body, dot: Digraph) -> None:
    """One arrow from the condition to the frame of a part; unseen ones hold all of the part below it."""
    starts = [n.name for n in sorted(filter(_is_start, drawn(body)), key=_first_use)] or [nothing_name(node, label)]
    arrow = {"label": label if node.target is not region_loop else "", "color": "#d9480f", "fontcolor": "#d9480f"}
    dot.edge(node.name, starts[0], lhead=part_name(node, label), penwidth="1.5", **arrow)
    for start in starts[1:]:
        dot.edge(node.name, start, style="invis")


def _is_start(node: fx.Node) -> bool:
    """No arrow from within the same body leads to the box."""
    return not any(map(is_value, conditions(node) if is_whole(node) else node.all_input_nodes))


def _first_use(node: fx.Node) -> fx.Node:
    return min(node.users) if node.op == "placeholder" else node


def write_order(graph: fx.Graph, dot: Digraph) -> None:
    """Arrows from an op that changes a value in place to the ops that read it afterwards: no data edge shows this order."""
    changed_by: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for writer in dict.fromkeys(changed_by[n] for n in node.all_input_nodes if n in changed_by):
                if writer not in node.all_input_nodes:
                    dot.edge(writer.name, node.name, **_AFTERWARDS)
        changed_by.update((value, _writer_in(node, value)) for value in _changed(node))
        for _label, body in parts(node) if is_whole(node) else ():
            write_order(body.graph, dot)


def _changed(node: fx.Node) -> list[fx.Node]:
    """The values that an op changes in place."""
    return [] if is_region(node) and not is_whole(node) else [*written_nodes(node), *changed_containers(node)]


def _writer_in(node: fx.Node, value: fx.Node) -> fx.Node:
    """The op that changes `value`: for a region the last op inside that visibly does, else the region."""
    for _label, body in reversed(parts(node)) if is_whole(node) else ():
        for placeholder, given in zip(body.placeholders, inputs_of(node), strict=True):
            inside = [user for user in placeholder.users if given is value and placeholder in _changed(user)]
            if inside:
                return _writer_in(max(inside), placeholder)
    return node
