"""Matching the left side of a rule against the graph.

A left side may match more than once (either order of a sum, alternatives), so matching is a search: it yields one `Match`
after the other, in the order in which the rule writes the alternatives. A `Match` is immutable; extending it makes another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ir_tools.ir import Block
from ir_tools.ir.dialect import bound_arguments
from ir_tools.ir.host import TENSOR, value_type
from ir_tools.rewrite.rule import COMMUTATIVE, Each, Known, OneOf, OpPattern, Rule, Unknown, Value, call_with, wrap


@dataclass(frozen=True)
class Match:
    """Where a rule fits: the root node, every node of the left side, and what the unknowns stand for."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    bound: dict[str, Any]  # unknown -> node, literal, None, or a list of these
    named: dict[str, Any]
    not_constant: tuple[str, ...] = ()  # unknowns that should be known now and are not

    @property
    def inner(self) -> list[fx.Node]:
        return [n for n in self.nodes if n is not self.root]

    @property
    def operands(self) -> list[fx.Node]:
        """The values that enter the match from outside."""
        return [n for value in self.bound.values() for n in _nodes(value)]

    def view(self, rule: Rule, program: Block) -> dict[str, Any]:
        """What `requires` and `replace` see, by name: Values, constant tensors, literals and named Calls."""
        names = {p.name for p in rule.pattern.inner() if p.name is not None}
        out: dict[str, Any] = {name: wrap(self.named.get(name)) for name in names}
        for name, unknown in rule.unknowns.items():
            out[name] = _seen(unknown, self.bound.get(name), program)
        return out


def _seen(unknown: Unknown, value: Any, program: Block) -> Any:
    if isinstance(value, list):
        return [_seen(unknown, v, program) for v in value]
    if isinstance(value, fx.Node) and (Tensor in unknown.types or Known in unknown.types):
        constant = program.constant(value)
        return constant if constant is not None else wrap(value)
    return wrap(value)


def _nodes(value: Any) -> list[fx.Node]:
    if isinstance(value, list):
        return [n for v in value for n in _nodes(v)]
    return [value] if isinstance(value, fx.Node) else []


def matches_at(rule: Rule, node: fx.Node, program: Block) -> Iterator[Match]:
    """The matches of `rule` with `node` as its root."""
    for match in structural_matches_at(rule, node, program):
        if not rule.when or all(call_with(condition, match.view(rule, program)) for condition in rule.when):
            yield match


def structural_matches_at(rule: Rule, node: fx.Node, program: Block) -> Iterator[Match]:
    """The same by the ops alone, whatever `when` says."""
    return _fits(rule.pattern, node, program, Match(node, (), {}, {}))


def _fits(pattern: Any, value: Any, program: Block, match: Match) -> Iterator[Match]:
    if isinstance(pattern, OneOf):
        for option in pattern.options:
            yield from _fits(option, value, program, match)
    elif isinstance(pattern, OpPattern):
        yield from _op_fits(pattern, value, program, match)
    elif isinstance(pattern, Each):
        yield from _each_fits(pattern, value, program, match)
    elif isinstance(pattern, list):
        if isinstance(value, (list, tuple)) and len(value) == len(pattern):
            yield from _all_fit(list(zip(pattern, value)), program, match)
    elif isinstance(pattern, Unknown):
        yield from _unknown_fits(pattern, value, program, match)
    elif not isinstance(value, fx.Node) and pattern == value:
        yield match


def _op_fits(pattern: OpPattern, value: Any, program: Block, match: Match) -> Iterator[Match]:
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in pattern.targets:
        return
    given = bound_arguments(value)
    positional = list(given.values())
    if len(pattern.args) > len(positional):
        return
    named = {**match.named, pattern.name: value} if pattern.name is not None else match.named
    # One value may match two parts of the left side: it comes behind its users at both.
    nodes = (*(n for n in match.nodes if n is not value), value)
    match = replace(match, nodes=nodes, named=named)
    by_name = [(part, given.get(name)) for name, part in pattern.kwargs.items()]
    for arguments in _orders(value, positional, pattern):
        yield from _all_fit([*zip(pattern.args, arguments), *by_name], program, match)


def _orders(node: fx.Node, positional: list[Any], pattern: OpPattern) -> Iterator[Sequence[Any]]:
    yield positional
    exchangeable = node.target in COMMUTATIVE and len(pattern.args) >= 2 and positional[0] is not positional[1]
    if exchangeable and bound_arguments(node).get("alpha", 1) == 1:
        yield [positional[1], positional[0], *positional[2:]]


def _all_fit(pairs: Sequence[tuple[Any, Any]], program: Block, match: Match) -> Iterator[Match]:
    if not pairs:
        yield match
        return
    (pattern, value), *rest = pairs
    for further in _fits(pattern, value, program, match):
        yield from _all_fit(rest, program, further)


def _each_fits(pattern: Each, value: Any, program: Block, match: Match) -> Iterator[Match]:
    if not isinstance(value, (list, tuple)) or not value:
        return
    found = []
    for element in value:
        fitting = next(_fits(pattern.element, element, program, Match(match.root, (), {}, {})), None)
        if fitting is None:
            return
        found.append(fitting)
    yield replace(
        match,
        nodes=(*match.nodes, *(n for f in found for n in f.nodes)),
        bound=match.bound | {name: [f.bound.get(name) for f in found] for name in found[0].bound},
        named=match.named | {name: [f.named.get(name) for f in found] for name in found[0].named},
        not_constant=(*match.not_constant, *dict.fromkeys(name for f in found for name in f.not_constant)),
    )


def _unknown_fits(unknown: Unknown, value: Any, program: Block, match: Match) -> Iterator[Match]:
    if unknown.name in match.bound:
        if _same(match.bound[unknown.name], value):
            yield match
        return
    missing = match.not_constant
    if value is None:
        fits = unknown.optional
    elif isinstance(value, fx.Node):
        constant = program.constant(value) is not None
        fits = value_type(value) == TENSOR and bool({Value, Tensor} & {*unknown.types})
        fits = fits or (Known in unknown.types and constant)
        if fits and not constant and Value not in unknown.types:
            missing = (*missing, unknown.name)
    elif unknown.variadic:
        fits = isinstance(value, (list, tuple)) and all(isinstance(v, fx.Node) for v in value)
        value = list(value) if fits else value
    else:
        fits = unknown.takes_literal(value)
    if fits:
        yield replace(match, bound=match.bound | {unknown.name: value}, not_constant=missing)


def _same(one: Any, other: Any) -> bool:
    """The same value of the graph, or equal literals."""
    if isinstance(one, fx.Node) or isinstance(other, fx.Node):
        return one is other
    if isinstance(one, list) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)

