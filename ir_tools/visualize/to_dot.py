"""A Program as a drawing: DOT text, and SVG where the graphviz program `dot` is installed.

Reading a drawing: one box per op with its name, its result's dtype and shape, and the constants that it reads; boxes
are framed by module; the fill says what kind of op it is (the legend lists the kinds present); a thick red border marks
the nodes that the last pass made. Hovering over a box in the SVG shows the whole call.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphviz import Digraph, escape
from torch import fx
from torch._ops import OpOverload

from ir_tools.ir.dialect import DIALECT_ONLY, bound_arguments, getitem, nodes_in, op_name, short_name
from ir_tools.ir.facts import fact
from ir_tools.ir.origin import origin
from ir_tools.ir.program import Program
from ir_tools.visualize.to_text import describe_value, node_text, stated_arguments

LARGE = 400
"""Ops above which layout settings trade beauty for time."""

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
    "effect": ("#ffc9c9", "writes into its argument"),
    "other": ("#f8f9fa", "other"),
}
_NEW = "#e03131"
_INPUT = "#ffffff"

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
    writes = isinstance(target, OpOverload) and target._schema.is_mutable
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


def _constant_lines(node: fx.Node, program: Program) -> list[str]:
    """`w: layer1.0.conv1.weight f32[64,64,1,1]`; the argument's name only where the path does not already end in it."""
    lines = []
    arguments = bound_arguments(node) if isinstance(node.target, OpOverload) else {"": node.args}
    for name, value in arguments.items():
        for constant in nodes_in(value):
            if constant.op != "get_attr":
                continue
            path = str(constant.target)
            text = f"{path} {describe_value(program.constants.get(path))}"
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
        self.new_nodes = frozenset(new_nodes)
        self.kinds: set[str] = set()
        self.new_seen = False

    def box(self, node: fx.Node, dot: Digraph) -> None:
        kind = kind_of(node)
        self.kinds.add(kind)
        lines = dict.fromkeys((_title(node), node.name, describe_value(fact(node))))  # `relu` may be called "relu"
        label = "".join(f"{escape(line)}\\n" for line in lines)
        label += "".join(f"{escape(line)}\\l" for line in _constant_lines(node, self.program))
        style: dict[str, str] = {}
        if node.name in self.new_nodes:
            self.new_seen = True
            style = {"color": _NEW, "penwidth": "3"}
        tooltip = escape(f"{node.name} = {node_text(node)}" + _made_by(node))
        dot.node(node.name, label, fillcolor=KINDS[kind][0], tooltip=tooltip, **style)

    def legend(self, dot: Digraph) -> None:
        rows = [_legend_row(f'BGCOLOR="{KINDS[kind][0]}"', KINDS[kind][1]) for kind in KINDS if kind in self.kinds]
        if self.new_seen:
            rows.append(_legend_row(f'BORDER="2" COLOR="{_NEW}"', "made by this pass"))
        table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="3">{"".join(rows)}</TABLE>'
        # No fx node has a space in its name.
        dot.node("legend ", f"<{table}>", shape="plain", style="", tooltip="legend")


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
    nodes = program.nodes
    calls = [n for n in nodes if n.op not in ("placeholder", "get_attr", "output")]
    dot = Digraph("program")
    dot.attr(rankdir="TB", label=escape(title), labelloc="t", fontname="Helvetica", fontsize="12", tooltip=" ")
    if len(calls) > LARGE:
        dot.attr(nslimit="1", nslimit1="1", mclimit="0.3", splines="polyline")
    dot.attr("node", shape="box", style="rounded,filled", fontname="Helvetica", fontsize="10", margin="0.2,0.06")
    dot.attr("edge", fontname="Helvetica", fontsize="8", color="#495057", arrowsize="0.7")

    names = [spec.name for spec in program.signature.inputs]
    placeholders = [n for n in nodes if n.op == "placeholder"]
    for node, name in zip(placeholders, names + [n.name for n in placeholders[len(names) :]], strict=False):
        label = f"input\\n{escape(name)}\\n{escape(describe_value(fact(node)))}"
        dot.node(node.name, label, shape="invhouse", style="filled", fillcolor=_INPUT, tooltip=escape(name))

    writer = _Writer(program, new_nodes)
    _write_frame(_frames(calls), dot, writer.box, MODULE_LEVELS)

    for node in nodes:
        if node.op == "output":
            _write_output(node, dot)
        elif node.op == "call_function":
            _write_edges(node, dot)
    writer.legend(dot)
    return dot.source


def _write_edges(node: fx.Node, dot: Digraph) -> None:
    labels = _edge_labels(node)
    for source in node.all_input_nodes:
        if source.op != "get_attr":
            dot.edge(source.name, node.name, label=escape(labels[source]) if source in labels else None)


def _write_output(node: fx.Node, dot: Digraph) -> None:
    values: list[Any] = list(nodes_in(node.args))
    facts = "\\n".join(escape(describe_value(fact(v))) for v in values[:8])
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
    write_whole(Path(path), done.stdout)
    return None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    before = {n.name for n in previous.graph.nodes} if previous is not None else None
    new = frozenset(n.name for n in program.calls if n.name not in before) if before is not None else frozenset()
    title = f"{stem}: {len(program)} ops"
    if previous is not None:
        title += " (unchanged)" if program is previous else f" ({len(previous)} before, {len(new)} new)"
    text = to_dot(program, title=title, new_nodes=new)
    dot_path = folder / f"{stem}.dot"
    write_whole(dot_path, text.encode())
    svg_path = folder / f"{stem}.svg"
    svg_path.unlink(missing_ok=True)  # a drawing of an earlier run would show another graph
    reason = draw_svg(text, svg_path, timeout)
    if reason is not None:
        tell(reason)
        return [dot_path]
    return [dot_path, svg_path]
