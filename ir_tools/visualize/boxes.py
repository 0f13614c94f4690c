"""Boxes of a drawing: one for each op, frames with parts for regions, and the legend of the kinds that are there."""

from __future__ import annotations

import html
from collections.abc import Collection, Sequence
from typing import Any

from graphviz import Digraph, escape
from torch import fx

from ir_tools.ir.dialect import bound_arguments, getitem, nodes_in, short_name
from ir_tools.ir.host import fail
from ir_tools.ir.prepack import is_prepack
from ir_tools.ir.program import Program
from ir_tools.ir.provenance import record
from ir_tools.ir.regions import Body, inputs_of, region_loop
from ir_tools.torch_compat.operators import OpOverload
from ir_tools.visualize.control import (
    drawn,
    is_result,
    is_value,
    is_whole,
    next_value,
    own_count,
    parts,
    region_text,
    result_nodes,
    result_of,
)
from ir_tools.visualize.kinds import KINDS, kind_of
from ir_tools.visualize.module_frames import frames, write_frame
from ir_tools.visualize.to_text import argument_text, node_text, stated_arguments
from ir_tools.visualize.values import Values

LONGEST_SIZE = 24
"""Characters of a symbolic size in a box; the listing has it whole."""

MODULE_LEVELS = 3
"""How many frames may lie in each other; deeper ones would be frames around one or two boxes."""

_NEW = "#e03131"
INPUT = "#ffffff"
_REGION = {"style": "rounded,filled", "color": "#f08c00", "fillcolor": "#fff4e6", "fontcolor": "#d9480f", "penwidth": "1.5"}
_PART = {"style": "rounded,filled", "color": "#f08c00", "fillcolor": "#ffffff", "fontcolor": "#d9480f"}


def _title(node: fx.Node) -> str:
    """The op and what makes it special: `conv_act (+residual, relu)`, `getitem [0]`."""
    name = short_name(node.target)
    if node.target is getitem and len(node.args) == 2:
        return f"{name} [{node.args[1]}]"
    stated = stated_arguments(node)
    extras = ["+residual"] if isinstance(stated.get("residual"), fx.Node) else []
    extras += [v for v in (stated.get(k) for k in ("act", "attr", "binary_attr", "unary_attr")) if isinstance(v, str)]
    extras = [e for e in extras if e not in ("", "none")]
    return f"{name} ({', '.join(extras)})" if extras else name


def _constant_lines(node: fx.Node, writer: Boxes) -> list[str]:
    """`w: layer1.0.conv1.weight f32[64,64,1,1]`; the argument's name only where the path does not already end in it."""
    lines = []
    program = writer.program
    arguments = bound_arguments(node) if isinstance(node.target, OpOverload) else {"": node.args}
    for name, value in arguments.items():
        for constant in nodes_in(value):
            packed = is_prepack(constant)
            if packed:
                constant = constant.all_input_nodes[0]
            if constant.op != "get_attr":
                continue
            path = str(constant.target)
            text = f"{path} {writer.values.describe(program.constants.get(path))}"
            if packed:
                text += " packed"
            if name and path.partition("@")[0].rpartition(".")[2] != name:
                text = f"{name}: {text}"
            lines.append(text)
    return lines


class Boxes:
    """Writes boxes; remembers which kinds it met, for the legend."""

    def __init__(self, program: Program, new_nodes: Collection[str]):
        self.program = program
        self.values = Values(program, LONGEST_SIZE)
        self.names = short_names(program.graph)
        self.new_nodes = frozenset(new_nodes)
        self.kinds: set[str] = set()
        self.new_seen = False

    def graph(self, nodes: list[fx.Node], dot: Digraph) -> None:
        """The boxes of a graph, framed by module, with regions in frames of their own."""
        calls = [n for n in nodes if n.op not in ("placeholder", "output") and is_value(n) and not is_result(n)]
        write_frame(frames(calls), dot, self.call, MODULE_LEVELS)

    def call(self, node: fx.Node, dot: Digraph) -> None:
        if is_whole(node):
            self.region(node, dot)
        else:
            value = argument_text(node.args[0]) if node.target is fail else self.values.of(node)
            self.box(node, dot, [_title(node), self.names[node], value], _constant_lines(node, self))

    def box(self, node: fx.Node, dot: Digraph, lines: list[str], notes: Sequence[str] = (), **style: str) -> None:
        kind = kind_of(node)
        self.kinds.add(kind)
        label = "".join(f"{escape(line)}\\n" for line in dict.fromkeys(lines))  # `relu` may be called "relu"
        label += "".join(f"{escape(line)}\\l" for line in notes)
        if node.name in self.new_nodes:
            self.new_seen = True
            style = {**style, "color": _NEW, "penwidth": "3"}
        tooltip = escape(f"{node.name} = {node_text(node)}" + _made_by(node))
        dot.node(node.name, label, fillcolor=KINDS[kind][0], tooltip=tooltip, **style)

    # -- regions ------------------------------------------------------------------------------------------------------

    def region(self, node: fx.Node, dot: Digraph) -> None:
        """The condition, a frame for each part, and the results, in a frame."""
        with dot.subgraph(name=f"cluster_{node.name} ") as cluster:
            cluster.attr(label="", **_REGION)
            text = region_text(node, self.text)
            self.box(node, cluster, [text.replace(" while", "\nwhile").replace(", ", ",\n")], shape="diamond", margin="0.02")
            for label, body in parts(node):
                with cluster.subgraph(name=part_name(node, label)) as frame:
                    frame.attr(label=label, **_PART)
                    self.part(node, label, body, frame)
            for number in range(len(parts(node)[0][1].results)):
                for result in result_nodes(node, number):
                    self.box(result, cluster, [self.names[result], self.values.of(result)], self.literals(node, number))

    def part(self, node: fx.Node, label: str, body: Body, dot: Digraph) -> None:
        """The boxes of a body, below those for what it is given."""
        for placeholder, given in zip(body.placeholders, inputs_of(node), strict=True):
            if not placeholder.users:
                continue
            lines = [self.names[placeholder], self.values.of(placeholder)]
            if given is not None and not is_value(given):
                lines.append(f"at first {self.text(given)}" if node.target is region_loop else self.text(given))
            following = next_value(node, body, placeholder)
            if following is not None and not is_value(following):
                lines.append(f"then {self.text(following)}")
            style = {"shape": "ellipse", "style": "filled", "fillcolor": INPUT, "margin": "0.03"}
            dot.node(placeholder.name, "".join(f"{escape(line)}\\n" for line in lines), tooltip=placeholder.name, **style)
        self.graph(list(body.graph.nodes), dot)
        if not drawn(body):
            dot.node(nothing_name(node, label), "no ops", shape="plaintext", style="", tooltip=label)

    def literals(self, node: fx.Node, number: int) -> list[str]:
        """What parts give for a result without an arrow to show for it: `else: False`."""
        given = [(label, result_of(node, body, number)) for label, body in parts(node)]
        return [f"{label}: {self.text(value)}" for label, value in given if not is_value(value)]

    def text(self, value: Any) -> str:
        """An argument with the names that the boxes bear."""
        return self.names.get(value, value.name) if is_value(value) else argument_text(value)

    # -- legend -------------------------------------------------------------------------------------------------------

    def legend(self, dot: Digraph) -> None:
        rows = [_legend_row(f'BGCOLOR="{KINDS[kind][0]}"', KINDS[kind][1]) for kind in KINDS if kind in self.kinds]
        if self.new_seen:
            rows.append(_legend_row(f'BORDER="2" COLOR="{_NEW}"', "made by this pass"))
        table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3">{"".join(rows)}</TABLE>'
        # No fx node has a space in its name.
        dot.node("legend ", f"<{table}>", shape="plain", style="", tooltip="legend")


def short_names(graph: fx.Graph, prefix: str = "", given: dict[fx.Node, str] | None = None) -> dict[fx.Node, str]:
    """The names that boxes bear. A frame says which body a box is in, so its name need not: `conv2d` for `loop1_conv2d`.

    What a body is given goes by the name that it has outside.
    """
    names: dict[fx.Node, str] = dict(given or {})
    for node in graph.nodes:
        names.setdefault(node, node.name.removeprefix(prefix))
        if not is_whole(node):
            continue
        for _label, body in parts(node):
            operands = zip(body.placeholders[own_count(node) :], inputs_of(node)[own_count(node) :], strict=True)
            outside = {p: names[value] for p, value in operands if isinstance(value, fx.Node)}
            names.update(short_names(body.graph, body.name, outside))
    return names


def part_name(node: fx.Node, label: str) -> str:
    return f"cluster_{node.name} {label}"


def nothing_name(node: fx.Node, label: str) -> str:
    return f"{node.name} {label} nothing"


def _legend_row(swatch: str, text: str) -> str:
    return f'<TR><TD {swatch} WIDTH="24"> </TD><TD ALIGN="LEFT">{html.escape(text)}</TD></TR>'


def _made_by(node: fx.Node) -> str:
    where = record(node)
    text = f"  # {where.location}" if where.captured.module else ""
    return text + (f", made by {', '.join(where.passes)}" if where.passes else "")
