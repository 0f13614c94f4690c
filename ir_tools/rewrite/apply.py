"""Applying rules: matching in order of execution, the conditions that hold for every rule, and the journal.

Conditions that no rule states for itself:
- an op inside the match has no reader outside it (its value would be computed twice, or lost);
- nobody writes into a value of the match (moving an op past a write changes what it reads);
- what the rule wants to know now (a `Tensor` in its match) is a constant;
- the new value has the shape and dtype of the old one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ir_tools.errors import PassesError
from ir_tools.ir import Block, Draft, facts
from ir_tools.ir.dialect import short_name
from ir_tools.ir.origin import place
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.journal import Journal
from ir_tools.rewrite.match import Match, match_at
from ir_tools.rewrite.rule import Rule, Value, call_with, reason

MOST_REWRITES = 100
"""At one place; a rule that fits more often than that fits its own result."""


class EndlessRuleError(PassesError, RuntimeError):
    """The rules of a pass undo each other, or one fits its own result."""


def apply_rules(program: Block, rules: Sequence[Rule], journal: Journal, made_by: str) -> Block:
    """Apply `rules`, earlier ones first at each node, until none fits. The very `program` when none did."""
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.pattern.targets:
            by_target.setdefault(target, []).append(rule)
    if not any(node.target in by_target for node in program.calls):
        return program
    draft = Draft.of(program)
    mutated = draft.program.mutated_values
    for node in draft.program.calls:
        root = node
        for _ in range(MOST_REWRITES):
            new = _rewrite_at(draft, root, by_target.get(root.target, ()), mutated, journal, made_by)
            if new is None:
                break
            root = new
        else:
            last = journal.rewrites[-1]
            raise EndlessRuleError(
                f"{made_by}: after {MOST_REWRITES} rewrites at {last.module} the rule {last.rule!r} still fits; "
                "a rule's right side must not fit the left side of a rule of the same pass for ever"
            )
    return draft.finish()


def _rewrite_at(
    draft: Draft, node: fx.Node, rules: Sequence[Rule], mutated: frozenset[fx.Node], journal: Journal, made_by: str
) -> fx.Node | None:
    """Apply the first rule that fits at `node`; return the new value, None when none does."""
    if not node.users:
        return None
    for rule in rules:
        match = match_at(rule, node, draft.program)
        if match is None:
            continue
        site, where = f"{rule.slug}@{node.name}", _where(match)
        if not journal.allows(site):
            continue
        why_not = _objection(rule, match, mutated, draft.program)
        new = None
        if why_not is None:
            new = _build(draft, rule, match, made_by)
            why_not = _changes(node, new)
        if why_not is not None:
            journal.refused(site, rule.name, where, why_not)
            continue
        assert new is not None
        draft.redirect(node, new)
        draft.drop(match.nodes)
        journal.rewrote(site, rule.name, where)
        return new
    return None


def _build(draft: Draft, rule: Rule, match: Match, made_by: str) -> fx.Node:
    with draft.before(match.root):
        ops = Ops(draft, made_by, match.root)
        result = call_with(rule.replace, {"op": ops, **match.view(rule, draft.program)})
    if not isinstance(result, Value):
        raise TypeError(f"{rule.replace.__name__} must return a Value, got {type(result).__name__}")
    return result._node


def _objection(rule: Rule, match: Match, mutated: frozenset[fx.Node], program: Block) -> str | None:
    """Why the rule must not be applied here, None when it may."""
    inside = set(match.nodes)
    for node in match.inner:
        for reader in node.users:
            if reader not in inside:
                return f"the result of {short_name(node.target)} {place(node)} has another reader ({_name(reader)})"
    for node in match.operands:
        if node in inside:
            return f"the result of {short_name(node.target)} {place(node)} is read twice by the pattern"
    for node in (*match.nodes, *match.operands):
        if node in mutated:
            return f"{_name(node)} is written in place"
    if match.not_constant:
        return f"known at run time only: {', '.join(match.not_constant)}"
    view = match.view(rule, program)
    for requirement in rule.requires:
        answer = call_with(requirement, view)
        if answer is None:
            return f"unknown, give example_inputs: {reason(requirement)}"
        if not answer:
            return f"not so: {reason(requirement)}"
    return None


def _changes(old: fx.Node, new: fx.Node) -> str | None:
    """What the new value does not keep of the old one's facts."""
    if facts.is_unknown(old) or facts.is_unknown(new):
        return "unknown, give example_inputs: the shape and dtype of the result are kept"
    if facts.shape(old) != facts.shape(new):
        return f"the result would change shape from {facts.shape(old)} to {facts.shape(new)}"
    if facts.dtype(old) != facts.dtype(new):
        return f"the result would change dtype from {facts.dtype(old)} to {facts.dtype(new)}"
    return None


def _where(match: Match) -> str:
    """The module path of the first op of the match that has one: for conv-bn the convolution's."""
    return place(match.nodes[-1])


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    return f"{short_name(node.target)} {place(node)}" if node.op == "call_function" else place(node)
