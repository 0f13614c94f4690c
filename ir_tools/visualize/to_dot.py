"""A Program as a drawing: DOT text, and SVG where the graphviz program `dot` is installed.

Reading a drawing: one box per op with its name, its result's dtype and shape, and the constants that it reads; boxes
are framed by module; the fill says what kind of op it is (the legend lists the kinds present); a thick red border marks
the nodes that the last pass made. Hovering over a box in the SVG shows the whole call.

An if or a loop is a diamond in a frame, with a frame for each part that it may run. Ellipses are the values that a part is
given; boxes at the lower edge are what comes out, with an arrow from each part. Dashed arrows lead to the next round; dotted
ones from an op that changes a list or tensor in place to the ops that read it afterwards.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphviz import Digraph, escape
from torch import fx

from ir_tools.files import write_atomically
from ir_tools.ir.dialect import DIALECT_ONLY, bound_arguments, getitem, nodes_in, op_name, short_name
from ir_tools.ir.effects import changed_containers, written_nodes
from ir_tools.ir.host import fail, is_host
from ir_tools.ir.origin import origin
from ir_tools.ir.program import Program, all_nodes
from ir_tools.ir.regions import Body, inputs_of, is_region, region_loop
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.visualize.control import (
    carried_count,
    conditions,
    is_result,
    is_whole,
    parts,
    region_text,
    result_nodes,
)
from ir_tools.visualize.to_text import argument_text, node_text, stated_arguments
from ir_tools.visualize.values import Values

LARGE = 400
"""Ops above which layout settings trade beauty for time."""

LONGEST_SIZE = 24
"""Characters of a symbolic size in a box; the listing has it whole."""

MODULE_LEVELS = 3
"""How many frames may lie in each other; deeper ones would be frames around one or two boxes."""

# kind -> (fill colour, what the legend says)
KINDS: dict[str, tuple[str, str]] = {
    "fused": ("#a5d8ff", "fused: op, residual and activation in one"),
    "packed": ("#96f2d7", "oneDNN kernel, weight packed"),
    "quantised": ("#d0bfff", "quantisation"),
    "compute": ("#d0ebff", "convolution, linear, attention"),
    "norm": ("#ffec99", "normalisation"),
    "activation": ("#d8f5a2", "activation"),
    "cast": ("#fcc2d7", "change of dtype or layout"),
    "effect": ("#ffc9c9", "writes into its argument, or raises"),
    "control": ("#ffd8a8", "if, loop: what decides, and what comes out"),
    "host": ("#dee2e6", "numbers and containers, no tensors"),
    "other": ("#f8f9fa", "other"),
}
_NEW = "#e03131"
_INPUT = "#ffffff"
_REGION = {"style": "rounded,filled", "color": "#f08c00", "fillcolor": "#fff4e6", "fontcolor": "#d9480f", "penwidth": "1.5"}
_PART = {"style": "rounded,filled", "color": "#f08c00", "fillcolor": "#ffffff", "fontcolor": "#d9480f"}

_OPS_BY_KIND = {
    "compute": """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm
        baddbmm einsum scaled_dot_product_attention embedding lstm gru""",
    "norm": "batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm softmax log_softmax",
    "activation": """relu relu6 hardtanh leaky_relu prelu hardswish hardsigmoid silu sigmoid tanh gelu elu selu mish
        clamp clamp_min clamp_max softplus""",
    "cast": "to to_mkldnn to_dense contiguous type_as _to_copy",
}
_KIND_OF_OP = {op: kind for kind, ops in _OPS_BY_KIND.items() for op in ops.split()}
_COMMUTATIVE = frozenset({"add", "mul", "add_", "mul_", "maximum", "minimum"})


def kind_of(node: fx.Node) -> str:
    """Which colour a call gets: a key of `KINDS`."""
    target = node.target
    writes = isinstance(target, OpOverload) and schema_of(target).is_mutable
    if is_whole(node) or is_result(node):
        return "control"
    if is_host(target):
        return "effect" if writes or target is fail else "host"
    namespace = op_name(target).partition("::")[0]
    if namespace == "quantized_decomposed" or short_name(target) == "quant_stub":
        return "quantised"
    if target in DIALECT_ONLY:
        return "fused"
    if namespace in ("mkldnn", "onednn"):
        return "packed"
    known = _KIND_OF_OP.get(short_name(target))
    if known:
        return known
    return "effect" if writes else "other"


# -- modules as frames ------------------------------------------------------------------------------------------------


@dataclass
class _Frame:
    """One visit to a module: its nodes and the visits to modules inside it, in order of execution."""

    path: str = ""
    first: str = ""
    nodes: list[fx.Node] = field(default_factory=list)
    inside: list[_Frame] = field(default_factory=list)
    size: int = 0


def _frames(nodes: list[fx.Node]) -> _Frame:
    """The visits to modules as a tree.

    A module that is called again later gets a second frame: one frame around both calls would pull boxes together that
    lie far apart in the data flow, and the drawing falls to pieces.
    """
    # Only modules with modules inside are framed: a frame around the boxes of one conv or relu would say nothing new.
    containers = {path for n in nodes for path in _above(origin(n).module)}
    stack = [root := _Frame()]
    for node in nodes:
        module = origin(node).module
        paths = [path for path in (*_above(module), module) if path in containers]
        while stack[-1].path and (len(stack) - 1 > len(paths) or stack[-1].path != paths[len(stack) - 2]):
            stack.pop()
        for path in paths[len(stack) - 1 :]:
            stack[-1].inside.append(inner := _Frame(path, node.name))
            stack.append(inner)
        for frame in stack:
            frame.size += 1
        stack[-1].nodes.append(node)
    return root


def _above(module: str) -> list[str]:
    """`["layer1", "layer1.0"]` for `layer1.0.conv1`."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _write_frame(frame: _Frame, dot: Digraph, write: Callable[[fx.Node, Digraph], None], levels: int) -> None:
    """Write the boxes of `frame` into `dot`, with a cluster for each module inside that says more than its parent."""
    for node in frame.nodes:
        write(node, dot)
    for inner in frame.inside:
        while len(inner.inside) == 1 and not inner.nodes:  # a chain of modules is framed once, by the innermost
            inner = inner.inside[0]
        if levels == 0 or inner.size < 2 or inner.size == frame.size:
            _write_frame(inner, dot, write, levels)
            continue
        with dot.subgraph(name=f"cluster_{inner.path} {inner.first}") as cluster:
            cluster.attr(label=escape(inner.path), style="rounded,dashed", color="#868e96", fontcolor="#495057")
            _write_frame(inner, cluster, write, levels - 1)


# -- boxes and arrows -------------------------------------------------------------------------------------------------


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


def _constant_lines(node: fx.Node, writer: _Writer) -> list[str]:
    """`w: layer1.0.conv1.weight f32[64,64,1,1]`; the argument's name only where the path does not already end in it."""
    lines = []
    program = writer.program
    arguments = bound_arguments(node) if isinstance(node.target, OpOverload) else {"": node.args}
    for name, value in arguments.items():
        for constant in nodes_in(value):
            if constant.op != "get_attr":
                continue
            path = str(constant.target)
            text = f"{path} {writer.values.describe(program.constants.get(path))}"
            if path in program.packings:
                text += " packed"
            if name and path.partition("@")[0].rpartition(".")[2] != name:
                text = f"{name}: {text}"
            lines.append(text)
    return lines


def _edge_labels(node: fx.Node) -> dict[fx.Node, str]:
    """Names for the arrows into an op whose operands cannot be told apart by looking, such as `residual`."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return {}
    if len([n for n in node.all_input_nodes if n.op != "get_attr"]) < 2 or short_name(node.target) in _COMMUTATIVE:
        return {}
    roles: dict[fx.Node, list[str]] = {}
    for name, value in bound_arguments(node).items():
        if isinstance(value, fx.Node):
            roles.setdefault(value, []).append(name)
    return {n: ", ".join(names) for n, names in roles.items()}


class _Writer:
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
        calls = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output") and not is_result(n)]
        _write_frame(_frames(calls), dot, self.call, MODULE_LEVELS)

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
        """What decides, a frame for each part, and the results, in a frame."""
        with dot.subgraph(name=f"cluster_{node.name} ") as cluster:
            cluster.attr(label="", **_REGION)
            text = region_text(node, self.text)
            self.box(node, cluster, [text.replace(" while", "\nwhile").replace(", ", ",\n")], shape="diamond", margin="0.02")
            for label, body in parts(node):
                with cluster.subgraph(name=_part_name(node, label)) as frame:
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
            if given is not None and not _is_value(given):
                lines.append(f"at first {self.text(given)}" if node.target is region_loop else self.text(given))
            following = next_value(node, body, placeholder)
            if following is not None and not _is_value(following):
                lines.append(f"then {self.text(following)}")
            style = {"shape": "ellipse", "style": "filled", "fillcolor": _INPUT, "margin": "0.03"}
            dot.node(placeholder.name, "".join(f"{escape(line)}\\n" for line in lines), tooltip=placeholder.name, **style)
        self.graph(list(body.graph.nodes), dot)
        if not _drawn(body):
            dot.node(_nothing(node, label), "no ops", shape="plaintext", style="", tooltip=label)

    def literals(self, node: fx.Node, number: int) -> list[str]:
        """What parts give for a result without an arrow to show for it: `else: False`."""
        given = [(label, _result(node, body, number)) for label, body in parts(node)]
        return [f"{label}: {self.text(value)}" for label, value in given if not _is_value(value)]

    def text(self, value: Any) -> str:
        """An argument with the names that the boxes bear."""
        return self.names.get(value, value.name) if _is_value(value) else argument_text(value)

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
            operands = zip(body.placeholders[_own(node) :], inputs_of(node)[_own(node) :], strict=True)
            outside = {p: names[value] for p, value in operands if isinstance(value, fx.Node)}
            names.update(short_names(body.graph, body.name, outside))
    return names


def _own(node: fx.Node) -> int:
    """How many of a body's placeholders are the loop's own: the number of the round, and what it carries."""
    return 1 + carried_count(node) if node.target is region_loop else 0


def _result(node: fx.Node, body: Body, number: int) -> Any:
    """What a body gives for a result of its region; a loop's body first says whether to go on."""
    return body.results[number + (node.target is region_loop)]


def next_value(node: fx.Node, body: Body, placeholder: fx.Node) -> Any:
    """What a loop hands to `placeholder` for the next round, None where it hands on nothing new."""
    number = body.placeholders.index(placeholder)
    if node.target is not region_loop or not 1 <= number < _own(node) or body.results[number] is placeholder:
        return None
    return body.results[number]


def _is_value(value: Any) -> bool:
    """The value has a box: an arrow can start there."""
    return isinstance(value, fx.Node) and value.op != "get_attr"


def _part_name(node: fx.Node, label: str) -> str:
    return f"cluster_{node.name} {label}"


def _nothing(node: fx.Node, label: str) -> str:
    return f"{node.name} {label} nothing"


def _drawn(body: Body) -> list[fx.Node]:
    """The nodes of a body that have boxes."""
    nodes = (n for n in body.graph.nodes if n.op not in ("get_attr", "output"))
    return [n for n in nodes if n.op != "placeholder" or n.users]


def _legend_row(swatch: str, text: str) -> str:
    return f'<TR><TD {swatch} WIDTH="24"> </TD><TD ALIGN="LEFT">{html.escape(text)}</TD></TR>'


def _made_by(node: fx.Node) -> str:
    where = origin(node)
    text = f"  # {where.module}" if where.module else ""
    return text + (f", made by {', '.join(where.rules)}" if where.rules else "")


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

    writer = _Writer(program, new_nodes)
    names = [spec.name for spec in program.signature.inputs]
    placeholders = program.placeholders
    for node, name in zip(placeholders, names + [n.name for n in placeholders[len(names) :]], strict=False):
        label = f"input\\n{escape(name)}\\n{escape(writer.values.of(node))}"
        dot.node(node.name, label, shape="invhouse", style="filled", fillcolor=_INPUT, tooltip=escape(name))
    writer.graph(program.nodes, dot)
    for node in program.graph.find_nodes(op="output"):
        _write_output(node, dot, writer.values)
    for node in all_nodes(program.graph):
        if is_whole(node):
            _write_region_edges(node, dot)
        elif node.op == "call_function" and not is_result(node):
            _write_edges(node, dot)
    _write_order(program.graph, dot)
    writer.legend(dot)
    return dot.source


def _write_edges(node: fx.Node, dot: Digraph) -> None:
    labels = _edge_labels(node)
    for source in node.all_input_nodes:
        if source.op != "get_attr":
            dot.edge(source.name, node.name, label=escape(labels[source]) if source in labels else None)


def _write_region_edges(node: fx.Node, dot: Digraph) -> None:
    """Arrows to what decides, into the parts, out of them, and to the next round."""
    for condition in filter(_is_value, conditions(node)):
        dot.edge(condition.name, node.name)
    for label, body in parts(node):
        _write_way_in(node, label, body, dot)
        for placeholder, given in zip(body.placeholders, inputs_of(node), strict=True):
            if not placeholder.users:
                continue
            if _is_value(given):
                dot.edge(given.name, placeholder.name)
            following = next_value(node, body, placeholder)
            if _is_value(following):
                dot.edge(following.name, placeholder.name, **_NEXT_ROUND)
        for number in range(len(body.results) - (node.target is region_loop)):
            value = _result(node, body, number)
            for result in result_nodes(node, number) if _is_value(value) else ():
                dot.edge(value.name, result.name, label=label if node.target is not region_loop else None)
        if node.target is region_loop and _is_value(body.results[0]):
            dot.edge(body.results[0].name, node.name, label="again?", **_NEXT_ROUND)
    for number in range(len(parts(node)[0][1].results) - (node.target is region_loop)):
        if not any(_is_value(_result(node, body, number)) for _label, body in parts(node)):
            for result in result_nodes(node, number):
                dot.edge(node.name, result.name, style="invis")  # nothing else holds it below what decides


_NEXT_ROUND = {"style": "dashed", "constraint": "false", "color": "#d9480f", "fontcolor": "#d9480f"}


def _write_way_in(node: fx.Node, label: str, body: Body, dot: Digraph) -> None:
    """One arrow from what decides to the frame of a part; unseen ones hold all of the part below it."""
    starts = [n.name for n in sorted(filter(_is_start, _drawn(body)), key=_first_use)] or [_nothing(node, label)]
    arrow = {"label": label if node.target is not region_loop else "", "color": "#d9480f", "fontcolor": "#d9480f"}
    dot.edge(node.name, starts[0], lhead=_part_name(node, label), penwidth="1.5", **arrow)
    for start in starts[1:]:
        dot.edge(node.name, start, style="invis")


def _is_start(node: fx.Node) -> bool:
    """No arrow from within the same body leads to the box."""
    return not any(map(_is_value, conditions(node) if is_whole(node) else node.all_input_nodes))


def _first_use(node: fx.Node) -> fx.Node:
    return min(node.users) if node.op == "placeholder" else node


def _write_order(graph: fx.Graph, dot: Digraph) -> None:
    """Arrows from what changes a value in place to what reads it afterwards, which no value passed on tells."""
    changed_by: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for writer in dict.fromkeys(changed_by[n] for n in node.all_input_nodes if n in changed_by):
                if writer not in node.all_input_nodes:
                    dot.edge(writer.name, node.name, **_AFTERWARDS)
        changed_by.update((value, _writer_in(node, value)) for value in _changed(node))
        for _label, body in parts(node) if is_whole(node) else ():
            _write_order(body.graph, dot)


def _changed(node: fx.Node) -> list[fx.Node]:
    """The values that an op changes in place."""
    return [] if is_region(node) and not is_whole(node) else [*written_nodes(node), *changed_containers(node)]


def _writer_in(node: fx.Node, value: fx.Node) -> fx.Node:
    """The op that changes `value`: for a region the last one in it that can be seen to, else the region."""
    for _label, body in reversed(parts(node)) if is_whole(node) else ():
        for placeholder, given in zip(body.placeholders, inputs_of(node), strict=True):
            inside = [user for user in placeholder.users if given is value and placeholder in _changed(user)]
            if inside:
                return _writer_in(max(inside), placeholder)
    return node


_AFTERWARDS = {"style": "dotted", "color": "#c92a2a", "fontcolor": "#c92a2a", "label": "after", "penwidth": "1.5"}


def _write_output(node: fx.Node, dot: Digraph, described: Values) -> None:
    values: list[Any] = list(nodes_in(node.args))
    facts = "\\n".join(escape(described.of(v)) for v in values[:8])
    more = f"\\n… {len(values) - 8} more" if len(values) > 8 else ""
    dot.node(node.name, f"output\\n{facts}{more}", shape="house", style="filled", fillcolor=_INPUT, tooltip="output")
    for i, value in enumerate(values):
        if value.op != "get_attr":
            dot.edge(value.name, node.name, label=str(i) if len(values) > 1 else None)


# -- files ------------------------------------------------------------------------------------------------------------


def draw_svg(dot_text: str, path: str | os.PathLike[str], timeout: float = 20) -> str | None:
    """Draw `dot_text` as SVG into `path` with the graphviz program `dot`, for at most `timeout` seconds.

    Returns None on success, else one line that says why there is no SVG. The file is written whole or not at all.
    Raises `OSError` when `path` cannot be written.
    """
    program = shutil.which("dot")
    if program is None:
        return "graphviz program `dot` not found: DOT files are written, no SVG"
    try:
        done = subprocess.run([program, "-Tsvg"], input=dot_text.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"graphviz `dot` needed more than {timeout:g} s for {Path(path).name}: the DOT file is written, no SVG"
    if done.returncode != 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[0]
        return f"graphviz `dot` failed ({reason}): the DOT file is written, no SVG"
    write_atomically(Path(path), done.stdout)
    return None


def write_dump(
    program: Program,
    directory: str | os.PathLike[str],
    index: int,
    name: str,
    previous: Program | None = None,
    *,
    timeout: float = 20,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write `03-fuse_conv_bn.dot` and, where possible, `03-fuse_conv_bn.svg`; return the paths written.

    Nodes that `previous` (the Program before this step) does not have are marked as new. `tell` is called with one line
    when there is no SVG. Raises `OSError` when the directory cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{index:02d}-{name}"
    before = {n.name for n in all_nodes((previous or program).graph)}
    new = frozenset(n.name for n in program.all_calls if n.name not in before)
    title = f"{stem}: {len(program)} ops"
    if previous is not None:
        title += " (unchanged)" if program is previous else f" ({len(previous)} before, {len(new)} new)"
    text = to_dot(program, title=title, new_nodes=new)
    dot_path = folder / f"{stem}.dot"
    write_atomically(dot_path, text.encode())
    svg_path = folder / f"{stem}.svg"
    svg_path.unlink(missing_ok=True)  # a drawing of an earlier run would show another graph
    reason = draw_svg(text, svg_path, timeout)
    if reason is not None:
        tell(reason)
        return [dot_path]
    return [dot_path, svg_path]
