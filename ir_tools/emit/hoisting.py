"""What a file prepares when it is loaded: the prepack ops of a Program, each with what it is called in the text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ir_tools.ir.dialect import map_argument, overload_name
from ir_tools.ir.prepack import constants_of, is_prepack, prepack_of
from ir_tools.ir.program import Program
from ir_tools.ir.regions import bodies, is_region

UNREAD = "a part of another prepack op"


@dataclass
class Hoisted:
    """The prepack ops, equal ones once: `packed` can be turned back into its plain constant, `prepared` cannot.

    `text_of`: how the text reads the result of each node.
    """

    packed: list[fx.Node] = field(default_factory=list)
    prepared: list[fx.Node] = field(default_factory=list)
    text_of: dict[fx.Node, str] = field(default_factory=dict)
    packed_name: str = ""
    prepared_name: str = ""


def prepacks(program: Program) -> list[fx.Node]:
    """The prepack ops on constants that nothing writes into: those of a graph, then those of the bodies in it."""
    return [node for node in _prepacks_in(program.graph) if not any(n.target in program.state for n in constants_of(node))]


def _prepacks_in(graph: fx.Graph) -> Iterator[fx.Node]:
    yield from (node for node in graph.nodes if node.users and is_prepack(node))
    for node in graph.nodes:
        if is_region(node):
            for body in bodies(node):
                yield from _prepacks_in(body.graph)


def plain_constants(program: Program, hoisted: Sequence[fx.Node]) -> list[str]:
    """The constants that something else than `hoisted` reads, in order of first appearance."""
    inside = set(hoisted)
    return list(dict.fromkeys(str(n.target) for n in _constants_in(program.graph) if any(u not in inside for u in n.users)))


def _constants_in(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.nodes:
        if node.op == "get_attr":
            yield node
        elif is_region(node):
            for body in bodies(node):
                yield from _constants_in(body.graph)


def hoisted_in(nodes: Sequence[fx.Node], packed_name: str, prepared_name: str) -> Hoisted:
    """The prepack ops by kind, and how the text reads them. Those that only others read are parts of these in the text."""
    hoisted = Hoisted(packed_name=packed_name, prepared_name=prepared_name)
    known: dict[str, str] = {}
    inside = set(nodes)
    for node in nodes:
        if all(user in inside for user in node.users):
            hoisted.text_of[node] = UNREAD
            continue
        key = _key(node)
        if key not in known:
            prepack = prepack_of(node)
            plain = all(n.op == "get_attr" for n in node.all_input_nodes)
            undone = plain and prepack is not None and prepack.is_undone_by_to_dense
            group, name = (hoisted.packed, packed_name) if undone else (hoisted.prepared, prepared_name)
            known[key] = f"self.{name}.{'weights' if undone else 'results'}[{len(group)}]"
            group.append(node)
        hoisted.text_of[node] = known[key]
    return hoisted


def _key(node: fx.Node) -> str:
    """Equal for the same op on the same constants."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        return f"constant {value.target}" if value.op == "get_attr" else _key(value)

    arguments = [map_argument(a, leaf) for a in node.args], {k: map_argument(v, leaf) for k, v in node.kwargs.items()}
    return f"{overload_name(node.target)}{arguments!r}"


def operands_of(program: Program, nodes: Sequence[fx.Node]) -> dict[str, torch.Tensor]:
    """The constants that the nodes read, by name, in order."""
    names = dict.fromkeys(str(n.target) for node in nodes for n in constants_of(node))
    return {name: program.constants[name] for name in names}
