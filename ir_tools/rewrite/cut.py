"""The cheapest split of ops in two sides, by a minimum cut.

    a value on one side that is read on the other is handed over, once for all its users there

                 cost of value v   =   charge(v)   if some user of v is on the other side

Which side an op is on may be fixed, or follow from the side of others. "Some user" needs one extra vertex per value and
direction: v -> a, a -> each user costs charge(v) once, however many users are cut off. The minimum over all splits is that
of a cut (Picard and Queyranne, "Selected applications of minimum cuts in networks", 1982); networkx finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

FIRST, SECOND = "first side", "second side"


class Split:
    """Ops on two sides. Of several cheapest splits, it is the one with the most on the first side.

    >>> split = Split()
    >>> split.fix("conv", first=True)
    >>> split.fix("softmax", first=False)
    >>> split.charge("conv", ["relu"], 1)
    >>> split.charge("relu", ["softmax", "linear"], 1)
    >>> split.follow("linear", ["softmax"])                  # linear is on the first side only if softmax is
    >>> sorted(split.first_side())
    ['conv', 'relu']
    """

    def __init__(self) -> None:
        self._network: nx.DiGraph = nx.DiGraph()
        self._network.add_nodes_from([FIRST, SECOND])
        self._fixed: dict[Hashable, str] = {}

    def fix(self, node: Hashable, *, first: bool) -> None:
        """`node` is on the first side, or on the second. Call this before the node appears in any other call."""
        self._fixed[node] = FIRST if first else SECOND

    def follow(self, node: Hashable, others: Iterable[Hashable]) -> None:
        """`node` may be on the first side only where all `others` are."""
        for other in others:
            self._edge(node, other, None)

    def together(self, node: Hashable, other: Hashable) -> None:
        """The two are on one side."""
        self._edge(node, other, None)
        self._edge(other, node, None)

    def charge(self, value: Hashable, users: Iterable[Hashable], cost: int) -> None:
        """`value` costs `cost` when at least one user is on the other side."""
        users = list(dict.fromkeys(users))
        out, back = ("from the first side", value), ("from the second side", value)
        if len(users) == 1:
            self._edge(value, users[0], cost)
            self._edge(users[0], value, cost)
            return
        self._edge(value, out, cost)
        self._edge(back, value, cost)
        for user in users:
            self._edge(out, user, None)
            self._edge(user, back, None)

    def first_side(self) -> set[Hashable]:
        """What is on the first side, of all that was named and not fixed elsewhere.

        Raises `networkx.NetworkXUnbounded` when what was fixed contradicts what follows.
        """
        _, (first, _) = nx.minimum_cut(self._network, FIRST, SECOND, flow_func=boykov_kolmogorov)
        named = {node for node in first if node != FIRST and not isinstance(node, tuple)}
        return named | {node for node, side in self._fixed.items() if side == FIRST}

    def _edge(self, a: Hashable, b: Hashable, capacity: int | None) -> None:
        """Cut when `a` is on the first side and `b` is not; without capacity it cannot be cut."""
        a, b = self._fixed.get(a, a), self._fixed.get(b, b)
        if a in (b, SECOND) or b == FIRST:
            return
        known = self._network.get_edge_data(a, b)
        if known is None:
            self._network.add_edge(a, b, **({} if capacity is None else {"capacity": capacity}))
        elif "capacity" in known:
            if capacity is None:
                del known["capacity"]
            else:
                known["capacity"] += capacity


@dataclass(frozen=True)
class Freedom:
    """Where an op may be. `first`: on the first side, or not; None leaves it open. `only_with`: on the first side only where
    all of these are. `together_with`: on the side of these.
    """

    first: bool | None = None
    only_with: Sequence[Hashable] = ()
    together_with: Sequence[Hashable] = ()


Costs = Callable[[Any], tuple[int, int]]
"""What handing a value over costs, in two units: no amount of the second outweighs one of the first."""


def cheapest(freedoms: Mapping[Any, Freedom], handed_over: Mapping[Any, Iterable[Hashable]], costs: Costs) -> set[Hashable]:
    """What is on the first side of the cheapest split that the freedoms allow.

    `handed_over`: the users of each value, which cost `costs(value)` once if any of them is on the other side than the value.

    >>> stays = Freedom(first=False)
    >>> sorted(cheapest({"x": stays, "conv": Freedom(first=True), "relu": Freedom(), "out": stays},
    ...                 {"x": ["conv"], "conv": ["relu"], "relu": ["out"]}, lambda value: (1, len(value))))
    ['conv', 'relu']
    """
    split = Split()
    for node, freedom in freedoms.items():
        if freedom.first is not None:
            split.fix(node, first=freedom.first)
    for node, freedom in freedoms.items():
        split.follow(node, freedom.only_with)
        for other in freedom.together_with:
            split.together(node, other)
    pairs = {value: costs(value) for value in handed_over}
    one = 1 + sum(second for _, second in pairs.values())
    for value, (first, second) in pairs.items():
        split.charge(value, handed_over[value], first * one + second)
    return split.first_side()
