"""Re-inference: the facts of values whose operands changed, from the change on and no further, and into bodies of regions.

    stale.mark(users, old, new)  an operand of `users` is another one: they are stale if it has another fact
    stale.refresh(node)          infer a stale node again; its users become stale if its fact is another one

A pass that goes through a graph in order refreshes each node before it looks at it: it never sees a fact of a graph that is no
more. An op keeps its symbols when it is inferred again, and as long as shapes and dtypes of its operands are as before, so are
its own: only strides may change, or become unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
from torch import fx

from ir_tools.ir.facts import (
    UNKNOWN,
    Fact,
    ScalarFact,
    Sizes,
    TensorFact,
    TupleFact,
    contiguous_strides,
    fact,
    is_contiguous,
    same_layout,
    set_fact,
)
from ir_tools.ir.inference_mode import InferenceMode
from ir_tools.ir.regions import Body, bodies, inputs_of, is_region, region_loop, with_bodies
from ir_tools.ir.shape_inference import FactError, compute_fact


class Stale:
    """The nodes of a graph whose operands changed since their facts were inferred."""

    def __init__(self, mode: InferenceMode):
        self.mode = mode
        self._nodes: dict[fx.Node, bool] = {}  # True: more than the strides of an operand changed

    def bodies_changed(self, region: fx.Node) -> None:
        """The bodies of a region are others."""
        self._nodes.setdefault(region, False)

    def refresh(self, node: fx.Node) -> None:
        """Infer the node again if it is stale."""
        if node not in self._nodes:
            return
        more, old = self._nodes.pop(node), fact(node)
        if node.op != "call_function":
            return
        new = _region_again(self.mode, node) if is_region(node) else _inferred_again(self.mode, node, more)
        if new != old:
            set_fact(node, new)
            self.mark(node.users, old, new)

    def refresh_all(self, nodes: Iterable[fx.Node]) -> None:
        """Refresh nodes that come in order of execution."""
        for node in nodes if self._nodes else ():
            self.refresh(node)

    def mark(self, users: Iterable[fx.Node], old: Fact, new: Fact) -> None:
        """An operand of `users` has another fact, or is another value."""
        if old != new:
            more = not _differ_in_strides_alone(old, new)
            for user in users:
                self._nodes[user] = self._nodes.get(user, False) or more


def _differ_in_strides_alone(one: Fact, other: Fact) -> bool:
    if isinstance(one, TupleFact) and isinstance(other, TupleFact):
        return len(one) == len(other) and all(map(_differ_in_strides_alone, one.parts, other.parts))
    if isinstance(one, TensorFact) and isinstance(other, TensorFact):
        return replace(one, strides=None) == replace(other, strides=None)
    return one == other


def _inferred_again(mode: InferenceMode, node: fx.Node, more: bool) -> Fact:
    try:
        new = compute_fact(mode, node.target, node.args, dict(node.kwargs))
    except FactError:
        if more:
            raise
        new = UNKNOWN  # a view that the new strides do not allow is made by a copy when it runs
    inherited = {s for n in node.all_input_nodes for s in _symbols_of(fact(n))}
    return _kept(fact(node), new, inherited, more)


def _kept(old: Fact, new: Fact, inherited: set[Any], more: bool) -> Fact:
    """The new fact, with what the old one knew already: its symbols, and (unless `more`) all but the strides."""
    if isinstance(old, TupleFact) and isinstance(new, TupleFact) and len(old) == len(new):
        return TupleFact(tuple(_kept(o, n, inherited, more) for o, n in zip(old.parts, new.parts)))
    if isinstance(old, TensorFact) and isinstance(new, TensorFact) and old.rank == new.rank:
        sizes = old.shape if not more else tuple(
            o if _symbols_in([n]) - inherited else n for o, n in zip(old.shape, new.shape, strict=True)
        )  # fmt: skip
        if sizes == new.shape:
            return new
        return replace(new if more else old, shape=sizes).lying(*_strides_over(new, sizes, inherited))
    if not more and new is UNKNOWN:
        return _without_strides(old)
    if not more or (isinstance(old, ScalarFact) and isinstance(new, ScalarFact) and _symbols_of(new) - inherited):
        return old
    return new


def _without_strides(known: Fact) -> Fact:
    if isinstance(known, TupleFact):
        return TupleFact(tuple(map(_without_strides, known.parts)))
    return known.lying(None) if isinstance(known, TensorFact) else known


def _strides_over(new: TensorFact, sizes: Sizes, inherited: set[Any]) -> tuple[Sizes | None, tuple[int, ...] | None]:
    """The strides of `new`, and of its example, with `sizes` for its own; unknown where another symbol is left in them."""
    if new.strides is None:
        return None, None
    swaps = {n: s for n, s in zip(new.shape, sizes, strict=True) if n != s}
    strides = tuple(s if isinstance(s, int) else s.xreplace(swaps) for s in new.strides)
    strides = tuple(int(s) if getattr(s, "is_number", False) else s for s in strides)
    if _symbols_in(strides) - inherited - _symbols_in(sizes):
        return None, None
    return strides, new.example_strides


def _symbols_of(known: Fact) -> set[Any]:
    if isinstance(known, TupleFact):
        return {s for part in known.parts for s in _symbols_of(part)}
    if isinstance(known, TensorFact):
        return _symbols_in([*known.shape, *(known.strides or ())])
    return _symbols_in([known.value]) if isinstance(known, ScalarFact) else set()


def _symbols_in(sizes: Iterable[Any]) -> set[Any]:
    return {s for n in sizes if isinstance(n, sympy.Basic) for s in n.free_symbols}


# -- regions -------------------------------------------------------------------------------------------------------------


def _region_again(mode: InferenceMode, node: fx.Node) -> Fact:
    """The facts of a region's results, after its bodies were inferred for the operands that they are given now."""
    old = fact(node)
    assert isinstance(old, TupleFact)
    given = [fact(v) for v in inputs_of(node)]
    if node.target is region_loop:
        (body,) = bodies(node)
        body, carried = _settled_loop(mode, body, given, len(old))
        new, results = [body], [carried]
    else:
        new = [_body_again(mode, body, _like(body.placeholders, given)) for body in bodies(node)]
        results = [[fact(v) for v in body.results] for body in new]
    if any(a is not b for a, b in zip(new, bodies(node), strict=True)):
        node.args = with_bodies(node, new)
    return TupleFact(tuple(_with_strides_of(o, found) for o, *found in zip(old.parts, *results, strict=True)))


def _settled_loop(mode: InferenceMode, body: Body, given: Sequence[Any], count: int) -> tuple[Body, list[Fact]]:
    """The body for what it is given in any round, and what is true of each carried value: of its start, and of every round."""
    start = [fact(v) for v in body.placeholders]
    known = [start[0], *_like(body.placeholders[1:], given[1:])]
    while True:
        new = _body_again(mode, body, known)
        found = [fact(v) for v in new.results[1:]]
        joined = [_with_strides_of(k, [k, f]) for k, f in zip(known[1 : count + 1], found, strict=True)]
        if joined == known[1 : count + 1]:
            return new, joined
        known[1 : count + 1] = joined


def _like(placeholders: Sequence[fx.Node], given: Sequence[Any]) -> list[Fact]:
    """The facts of placeholders with the strides of what they are given."""
    return [_with_strides_of(fact(p), [fact(g)]) for p, g in zip(placeholders, given, strict=True)]


def _with_strides_of(known: Fact, others: Sequence[Any]) -> Fact:
    """A fact with the strides that all of `others` have (what is no tensor, such as None, says nothing)."""
    if not isinstance(known, TensorFact):
        return known
    tensors = [o for o in others if isinstance(o, TensorFact)]
    if not tensors or any(isinstance(o, Fact) and o is UNKNOWN for o in others):
        return known.lying(None)
    first = tensors[0]
    if first.shape == known.shape and all(o.shape == first.shape and same_layout(first, o) for o in tensors[1:]):
        return known.lying(first.strides, first.example_strides)
    dense = all(o.rank == known.rank and is_contiguous(o) for o in tensors)  # of sizes that differ
    return known.lying(contiguous_strides(known.shape) if dense else None)


def _body_again(mode: InferenceMode, body: Body, given: Sequence[Fact]) -> Body:
    """The body with other facts for its placeholders; the very body where they are what they were."""
    if all(fact(p) == g for p, g in zip(body.placeholders, given, strict=True)):
        return body
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    new, stale = Body(graph, body.effects, body.name), Stale(mode)
    for placeholder, known in zip(new.placeholders, given, strict=True):
        old = fact(placeholder)
        set_fact(placeholder, known)
        stale.mark(placeholder.users, old, known)
    stale.refresh_all(graph.nodes)
    return new
