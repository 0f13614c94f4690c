"""Regions for people: what an if or a loop says of itself, its parts, and where its values come from and go to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ir_tools.ir.dialect import getitem
from ir_tools.ir.regions import Body, bodies, inputs_of, is_region, region_if


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
    """`if Bool`, `loop while lt, at most 6 times`; `write` spells an argument."""
    if node.target is region_if:
        return f"if {write(node.args[0])}"
    trips, condition, body = node.args[0], node.args[1], bodies(node)[0]
    all_rounds = condition is True and body.results[0] is True
    said = [f"while {write(condition)}"] if condition is not True else []
    said += [f"{'' if all_rounds else 'at most '}{write(trips)} times"] if trips is not None else []
    return f"loop {', '.join(said)}".rstrip()
