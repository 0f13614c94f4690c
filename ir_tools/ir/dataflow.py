"""Dataflow: what is known of each value of a Block, from its operands (forward) or from its users (backward).

    forward     known(v) = transfer(v, known)                               reads the operands of v in `known`
    backward    known(v) = join of transfer(u, v, known(u))                 over the users u of v; `start` where nobody reads v

A Block has no circles, so one sweep in order of execution, or against it, is the fixed point. A region is one node here, and
its bodies are Blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import or_
from types import MappingProxyType
from typing import TypeVar

from torch import fx

from ir_tools.ir.program import Block

T = TypeVar("T")


def forward(block: Block, transfer: Callable[[fx.Node, Mapping[fx.Node, T]], T]) -> Mapping[fx.Node, T]:
    """`transfer(node, known)` for each node of `block`; what it reads of its operands in `known` is there by then.

    >>> forward(block, lambda node, known: 1 + sum(known[n] for n in node.all_input_nodes))  # doctest: +SKIP
    """
    found: dict[fx.Node, T] = {}
    known = MappingProxyType(found)
    for node in block.nodes:
        found[node] = transfer(node, known)
    return known


def backward(
    block: Block, transfer: Callable[[fx.Node, fx.Node, T], T], join: Callable[[T, T], T], start: T
) -> Mapping[fx.Node, T]:
    """The join of `transfer(user, value, known(user))` over the users of each value, `start` for one without users.

    >>> backward(block, lambda user, value, known: 1, operator.add, 0)  # doctest: +SKIP
    """
    found = dict.fromkeys(block.nodes, start)
    for user in reversed(block.nodes):
        for value in user.all_input_nodes:
            found[value] = join(found[value], transfer(user, value, found[user]))
    return MappingProxyType(found)


def upstream(block: Block, starts: Callable[[fx.Node], bool], through: Callable[[fx.Node], bool]) -> frozenset[fx.Node]:
    """The ops that lead to an op for which `starts` holds, over ops for which `through` holds only; without the starts.

    >>> upstream(block, is_a_sine, is_pointwise)  # doctest: +SKIP
    """
    first = frozenset(node for node in block.calls if starts(node))
    if not first:
        return first
    passing = frozenset(node for node in block.calls if through(node)) - first
    leads = backward(block, lambda user, value, known: user in first or (known and user in passing), or_, False)
    return frozenset(node for node in passing if leads[node])
