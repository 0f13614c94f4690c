"""Modules as frames around the boxes of their ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graphviz import Digraph, escape
from torch import fx

from ir_tools.ir.provenance import record


@dataclass
class Frame:
    """One visit to a module: its nodes and the visits to modules inside it, in order of execution."""

    path: str = ""
    first: str = ""
    nodes: list[fx.Node] = field(default_factory=list)
    inside: list[Frame] = field(default_factory=list)
    size: int = 0


def frames(nodes: list[fx.Node]) -> Frame:
    """The visits to modules as a tree.

    A module that is called again later gets a second frame: one frame around both calls would pull boxes together that
    lie far apart in the data flow, and the drawing falls to pieces.
    """
    # Only modules with modules inside are framed: a frame around the boxes of one conv or relu would say nothing new.
    containers = {path for n in nodes for path in _above(record(n).captured.module)}
    stack = [root := Frame()]
    for node in nodes:
        module = record(node).captured.module
        paths = [path for path in (*_above(module), module) if path in containers]
        while stack[-1].path and (len(stack) - 1 > len(paths) or stack[-1].path != paths[len(stack) - 2]):
            stack.pop()
        for path in paths[len(stack) - 1 :]:
            stack[-1].inside.append(inner := Frame(path, node.name))
            stack.append(inner)
        for frame in stack:
            frame.size += 1
        stack[-1].nodes.append(node)
    return root


def _above(module: str) -> list[str]:
    """`["layer1", "layer1.0"]` for `layer1.0.conv1`."""
    parts = module.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def write_frame(frame: Frame, dot: Digraph, write: Callable[[fx.Node, Digraph], None], levels: int) -> None:
    """Write the boxes of `frame` into `dot`, with a cluster for each module inside that says more than its parent."""
    for node in frame.nodes:
        write(node, dot)
    for inner in frame.inside:
        while len(inner.inside) == 1 and not inner.nodes:  # a chain of modules is framed once, by the innermost
            inner = inner.inside[0]
        if levels == 0 or inner.size < 2 or inner.size == frame.size:
            write_frame(inner, dot, write, levels)
            continue
        with dot.subgraph(name=f"cluster_{inner.path} {inner.first}") as cluster:
            cluster.attr(label=escape(inner.path), style="rounded,dashed", color="#868e96", fontcolor="#495057")
            write_frame(inner, cluster, write, levels - 1)
