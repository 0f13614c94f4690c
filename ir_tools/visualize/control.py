"""Regions in listings and drawings: the title of an if or a loop, its parts, and where its values come from and go to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ir_tools.ir.dialect import getitem
from ir_tools.ir.prepack import is_prepack
from ir_tools.ir.regions import Body, bodies, inputs_of, is_region, region_if, region_loop


def is_whole(node: fx.Node) -> bool:
    """A region that can be taken apart; dumps are also drawn of graphs that a user's pass broke."""
    if not is_region(node) or (len(node.args), len(bodies(node))) not in ((4, 2), (5, 1)):
        return False
    return all(len(body.placeholders) == len(inputs_of(node)) for body in bodies(node))


def parts(node: fx.Node) -> list[tuple[str, Body]]:
    """The bodies of a region by name."""
    return list(zip(("then", "else") if node.target is region_if else ("each round",), bodies(node), strict=True))


def conditions(node: fx.Node) -> list[Any]:
    """What decides whether a body runs: the condition of an if; the number of rounds and the condition of a loop."""
    return list(node.args[: 1 if node.target is region_if else 2])


def carried_count(node: fx.Node) -> int:
    return 0 if node.target is region_if else len(node.args[3])  # type: ignore[arg-type]


def is_result(node: fx.Node) -> bool:
    """The node reads a result of a region."""
    return node.target is getitem and isinstance(node.args[0], fx.Node) and is_whole(node.args[0])


def result_nodes(node: fx.Node, number: int) -> list[fx.Node]:
    """The nodes that read one result of a region."""
    return [user for user in node.users if is_result(user) and user.args[1] == number]


def region_text(node: fx.Node, write: Callable[[Any], str]) -> str:
    """`if Bool`, `loop while lt, at most 6 times`; `write` prints an argument."""
    if node.target is region_if:
        return f"if {write(node.args[0])}"
    trips, condition, body = node.args[0], node.args[1], bodies(node)[0]
    all_rounds = condition is True and body.results[0] is True
    said = [f"while {write(condition)}"] if condition is not True else []
    said += [f"{'' if all_rounds else 'at most '}{write(trips)} times"] if trips is not None else []
    return f"loop {', '.join(said)}".rstrip()


def own_count(node: fx.Node) -> int:
    """How many of a body's placeholders are the loop's own: the number of the round, and what it carries."""
    return 1 + carried_count(node) if node.target is region_loop else 0


def result_of(node: fx.Node, body: Body, number: int) -> Any:
    """What a body gives for a result of its region; a loop's body first says whether to go on."""
    return body.results[number + (node.target is region_loop)]


def next_value(node: fx.Node, body: Body, placeholder: fx.Node) -> Any:
    """What a loop hands to `placeholder` for the next round, None where it hands on nothing new."""
    number = body.placeholders.index(placeholder)
    if node.target is not region_loop or not 1 <= number < own_count(node) or body.results[number] is placeholder:
        return None
    return body.results[number]


def is_value(value: Any) -> bool:
    """The value has a box: an arrow can start there."""
    return isinstance(value, fx.Node) and value.op != "get_attr" and not is_prepack(value)


def drawn(body: Body) -> list[fx.Node]:
    """The nodes of a body that have boxes."""
    nodes = (n for n in body.graph.nodes if n.op != "output" and is_value(n))
    return [n for n in nodes if n.op != "placeholder" or n.users]
