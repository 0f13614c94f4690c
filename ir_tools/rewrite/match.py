"""Matching the left side of a rule against the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from ir_tools.ir import Block
from ir_tools.ir.dialect import bound_arguments
from ir_tools.rewrite.rule import Call, Pattern, Rule, Unknown, wrap


@dataclass
class Match:
    """Where a rule fits: the root node, every node of the left side, and what the unknowns stand for."""

    root: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    bound: dict[str, Any] = field(default_factory=dict)  # unknown -> node, literal or None
    named: dict[str, fx.Node] = field(default_factory=dict)
    not_constant: list[str] = field(default_factory=list)  # unknowns that should be known now and are not

    @property
    def inner(self) -> list[fx.Node]:
        return [n for n in self.nodes if n is not self.root]

    @property
    def operands(self) -> list[fx.Node]:
        """The values that enter the match from outside."""
        return [v for v in self.bound.values() if isinstance(v, fx.Node)]

    def view(self, rule: Rule, program: Block) -> dict[str, Any]:
        """What `requires` and `replace` see, by name: Values, constant tensors, literals and named Calls."""
        out: dict[str, Any] = {name: Call(node) for name, node in self.named.items()}
        for name, value in self.bound.items():
            constant = rule.unknowns[name].kind == "constant" and value is not None
            out[name] = program.constant(value) if constant else wrap(value)
        return out


def match_at(rule: Rule, node: fx.Node, program: Block) -> Match | None:
    """The match of `rule` whose root is `node`, None when the left side does not fit."""
    match = Match(node)
    return match if _fits(rule.pattern, node, program, match) else None


def _fits(pattern: Pattern, value: Any, program: Block, match: Match) -> bool:
    if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in pattern.targets:
        return False
    given = bound_arguments(value)
    positional = list(given.values())[: len(pattern.args)]
    if not pattern.rest and len(pattern.args) > len(given):
        return False
    match.nodes.append(value)
    if pattern.name is not None:
        match.named[pattern.name] = value
    pairs = [*zip(pattern.args, positional, strict=False), *((p, given.get(k)) for k, p in pattern.kwargs.items())]
    return len(positional) == len(pattern.args) and all(_argument_fits(p, v, program, match) for p, v in pairs)


def _argument_fits(pattern: Any, value: Any, program: Block, match: Match) -> bool:
    if isinstance(pattern, Pattern):
        return _fits(pattern, value, program, match)
    if not isinstance(pattern, Unknown):
        return bool(pattern == value)
    if pattern.name in match.bound:
        return match.bound[pattern.name] is value
    if value is None:
        fits = pattern.optional
    elif pattern.kind == "constant":
        fits = isinstance(value, fx.Node)
        if program.constant(value) is None:
            match.not_constant.append(pattern.name)
    elif pattern.kind == "value":
        fits = isinstance(value, fx.Node)
    else:
        fits = not isinstance(value, fx.Node)
    if fits:
        match.bound[pattern.name] = value
    return fits
