"""Applying rules: matching in order of execution, the conditions that hold for every rule, and the rewrite log.

Conditions that no rule states for itself:
- an op inside the match has no user outside it (its value would be computed twice, or lost);
- no value of the match is written in place (moving an op past a write changes what it reads);
- plain arguments are known now, unless the rule accepts runtime numbers (`takes_runtime_numbers`);
- what the rule needs to know now (a `Tensor` in its match) is a constant;
- the new value has the shape and dtype of the old one, and, where the pass is exact, its memory layout: later sums add in
  the order of memory. Where layouts affect the numbers (`Block.layout_is_observable`), every pass keeps them;
- the ops of the right side accept the shapes and dtypes of their operands;
- an output with memory of its own does not come to share that of an input, a constant or another output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from torch import fx

from ir_tools.errors import PassesError
from ir_tools.ir import Block, Draft, alias_analysis, facts, shape_inference
from ir_tools.ir.dialect import bound_arguments, nodes_in, short_name
from ir_tools.ir.host import TENSOR, value_type
from ir_tools.ir.provenance import location, stand_for
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.match import Match, matches_at
from ir_tools.rewrite.rewrite_log import RewriteLog
from ir_tools.rewrite.rule import Rule, Value, call_with, reason

B = TypeVar("B", bound=Block)

CONTAINERS = frozenset({"container"})
"""Arguments that hold several tensors: the parts of an op's results."""

MOST_MATCHES = 16
"""Matches of one rule that are tried at one node: a sum of sums of sums has many orders of its operands."""

MOST_REWRITES = 100
"""Rewrites at one node; a rule that fits more often than that fits its own result."""


class EndlessRuleError(PassesError, RuntimeError):
    """The rules of a pass undo each other, or one fits its own result."""


def apply_rules(program: B, rules: Sequence[Rule], log: RewriteLog, made_by: str, *, exact: bool = False) -> B:
    """Apply `rules`, earlier ones first at each node, until none fits. Returns `program` itself when none did.

    `exact`: refuse also what changes the memory layout of a value.
    """
    by_target: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.roots:
            by_target.setdefault(target, []).append(rule)
    if not any(node.target in by_target for node in program.calls):
        return program
    draft = Draft.of(program)
    mutated = draft.program.mutated_values
    work = _Work(draft, by_target, mutated, log, made_by, exact or draft.program.layout_is_observable)
    refused_before = len(log.refusals)
    # A rewrite may remove a user of an earlier value: a rule that was refused because of that user may fit now.
    while True:
        del log.refusals[refused_before:]
        rewritten = len(log.rewrites)
        for node in draft.program.calls:
            draft.refresh(node)
            if node.target in by_target:
                work.rewrite_at(node)
        if len(log.rewrites) == rewritten:
            return draft.finish()


@dataclass(frozen=True)
class _Work:
    """One run of a tuple of rules over a draft."""

    draft: Draft
    by_target: dict[Any, list[Rule]]
    mutated: frozenset[fx.Node]
    log: RewriteLog
    made_by: str
    keeps_layout: bool

    def rewrite_at(self, node: fx.Node) -> None:
        """Apply what fits at `node`, then what fits at its result, and so on."""
        for _ in range(MOST_REWRITES):
            new = self._first_rewrite(node) if node.users else None
            if new is None:
                return
            node = new
        last = self.log.rewrites[-1]
        raise EndlessRuleError(
            f"{self.made_by}: after {MOST_REWRITES} rewrites at {last.module} the rule {last.rule!r} still fits; "
            "a rule's right side must not fit the left side of a rule of the same pass for ever"
        )

    def _first_rewrite(self, node: fx.Node) -> fx.Node | None:
        """Apply the first rule that fits at `node`; return the new value, None when none does."""
        for rule in self.by_target.get(node.target, ()):
            site = f"{rule.slug}@{node.name}"
            matches = islice(matches_at(rule, node, self.draft.program), MOST_MATCHES) if self.log.allows(site) else ()
            first_refusal: tuple[str, str] | None = None
            for match in matches:
                new, why_not = self._attempt(rule, match, site)
                if new is not None:
                    self.draft.redirect(node, new)
                    self.draft.drop(match.nodes)
                    self.log.rewrote(site, rule.name, _where(match))
                    return new
                first_refusal = first_refusal or (_where(match), why_not)
            if first_refusal is not None:
                self.log.refused(site, rule.name, *first_refusal)
        return None

    def _attempt(self, rule: Rule, match: Match, site: str) -> tuple[fx.Node | None, str]:
        """The new value; or None, with nothing left behind, and why not."""
        why_not = objection(rule, match, self.mutated, self.draft.program)
        if why_not is not None:
            return None, why_not
        ops = Ops(self.draft, self.made_by, match.root)
        try:
            with self.draft.before(match.root):
                result = call_with(rule.replace, {"op": ops, **match.view(rule, self.draft.program)})
        except shape_inference.FactError as error:
            result, ops.declined = None, f"the new op does not take these operands: {error}"
        if result is None and ops.declined:
            why_not = ops.declined
        elif not isinstance(result, Value):
            raise TypeError(f"{rule.replace.__name__} must return a Value, got {type(result).__name__}")
        else:
            why_not = changes(match.root, result._node, self.keeps_layout)
            if why_not is None:
                for new in ops.made:
                    stand_for(new, match.nodes, self.made_by, site)
                return result._node, ""
        self.draft.drop(ops.made[::-1])
        return None, why_not


def objection(rule: Rule, match: Match, mutated: frozenset[fx.Node], program: Block) -> str | None:
    """Why the rule must not be applied here, None when it may."""
    inside = set(match.nodes)
    for node in match.inner:
        for user in node.users:
            if user not in inside:
                return f"the result of {short_name(node.target)} {location(node)} has another user ({_name(user)})"
    for node in match.operands:
        if node in inside:
            return f"the result of {short_name(node.target)} {location(node)} is read twice by the pattern"
    for node in (*match.nodes, *match.operands):
        if node in mutated:
            return f"{_name(node)} is written in place"
    if not rule.takes_runtime_numbers:
        for node in match.nodes:
            for name, value in bound_arguments(node).items():
                if any(value_type(n) != TENSOR for n in nodes_in(value)) and name not in CONTAINERS:
                    return f"the argument {name} of {short_name(node.target)} is known at run time only"
    if match.not_constant:
        return f"known at run time only: {', '.join(match.not_constant)}"
    view = match.view(rule, program)
    for requirement in rule.requires:
        answer = call_with(requirement, view)
        if answer is None:
            return f"unknown: {reason(requirement)}"
        if not answer:
            return f"requirement not met: {reason(requirement)}"
    return None


def changes(old: fx.Node, new: fx.Node, keeps_layout: bool) -> str | None:
    """The first fact of the old value that the new one does not keep, None when it keeps all."""
    if facts.is_unknown(old) or facts.is_unknown(new):
        return "unknown: the shape and dtype of the result"
    if facts.shape(old) != facts.shape(new):
        return f"the result would change shape from {facts.shape(old)} to {facts.shape(new)}"
    if facts.dtype(old) != facts.dtype(new):
        return f"the result would change dtype from {facts.dtype(old)} to {facts.dtype(new)}"
    one, other = facts.tensor(old), facts.tensor(new)
    if keeps_layout and one is not None and other is not None and not facts.same_layout(one, other):
        return "the result would lie in memory in another order"
    if not alias_analysis.can_stand_for(new, old):
        return "the model's output would share memory with an input, a constant or another output"
    return None


def _where(match: Match) -> str:
    """The module path of the first op of the match that has one: for conv-bn the convolution's."""
    return location(match.nodes[-1])


def _name(node: fx.Node) -> str:
    if node.op == "output":
        return "the model's output"
    return f"{short_name(node.target)} {location(node)}" if node.op == "call_function" else location(node)
