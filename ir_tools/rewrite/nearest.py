"""The nearest miss: how far a rule matched at a node, and the first op or argument that differs from its pattern.

    matched conv2d, but its user is mul, not batch_norm
    matched batch_norm, but its operand input is relu, not layer

This is for diagnosis, of one node and one rule: nothing here is used while rules are applied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ir_tools.ir import Block
from ir_tools.ir.dialect import bound_arguments, short_name
from ir_tools.ir.provenance import location, locations
from ir_tools.rewrite.apply import objection
from ir_tools.rewrite.match import matches_at, structural_matches_at
from ir_tools.rewrite.rewrite_log import RewriteLog
from ir_tools.rewrite.rule import COMMUTATIVE, Each, OneOf, OpPattern, Rule, Unknown, call_with, reason
from ir_tools.rewrite.shapes import Pass

APPLIES = "matches: the rule applies"


@dataclass(frozen=True)
class NearMiss:
    """Why one rule of a pass did not take one op into a rewrite."""

    op: str
    module: str
    rule: str
    sentence: str


def near_misses(pass_: Pass, program: Block, where: str) -> list[NearMiss]:
    """The nearest miss of every rule of the pass, at every op whose module path or name is `where`, or lies inside it.

    Where a rule does apply there is no miss. Ops in branches and loops are looked at too. A pass that is not made of rules
    has none.
    """
    found: list[NearMiss] = []

    def look(block: Block, log: RewriteLog) -> Block:
        mutated = block.mutated_values
        for node in block.calls:
            if where in locations_of(node):
                for rule in pass_.rules:
                    sentence = nearest_miss(rule, node, block, mutated)
                    if sentence not in (None, APPLIES):
                        found.append(NearMiss(short_name(node.target), location(node), rule.name, str(sentence)))
        return block

    replace(pass_, function=look, given={})(program)
    return found


def locations_of(node: fx.Node) -> set[str]:
    """The name of an op, the paths of the modules that it comes from, and of those around them; what was fused into it, too."""
    return set(locations(node))


@dataclass(frozen=True)
class Miss:
    """How many ops of the left side matched, and the sentence that says why no more did."""

    matched: int
    sentence: str


def nearest_miss(rule: Rule, node: fx.Node, program: Block, mutated: frozenset[fx.Node] | None = None) -> str | None:
    """Why `rule` did not take `node` into a rewrite, as a sentence; None when no op of its left side is like `node`.

    The node may be any op of the left side. Where it fails at several points, the sentence is about the farthest.
    `mutated`: `program.mutated_values`, if the caller has them; finding them takes a walk over the graph.

    >>> import torch
    >>> from ir_tools.frontends.source import prepare
    >>> from ir_tools.frontends.capture import capture
    >>> from passes import CATALOGUE
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(2)).eval()
    >>> program = capture(prepare(model, [((torch.ones(1, 1, 4, 4),), {})]), "trace").program
    >>> nearest_miss(CATALOGUE["fuse_conv_bn"].rules[0], program.calls[0], program)
    'matched conv2d, but its user is relu, not batch_norm'
    """
    mutated = program.mutated_values if mutated is None else mutated
    misses = [miss for location in _locations(rule.pattern, node) for miss in _upwards(rule, location, node, program, mutated)]
    return max(misses, key=lambda miss: miss.matched).sentence if misses else None


_Location = tuple[OpPattern, ...]
"""An op of the left side, and the ops around it: innermost first, the root last."""


def _locations(pattern: Any, node: fx.Node, around: _Location = ()) -> Iterator[_Location]:
    """Where in the left side an op like `node` stands."""
    if isinstance(pattern, OneOf):
        for option in pattern.options:
            yield from _locations(option, node, around)
    elif isinstance(pattern, Each):
        yield from _locations(pattern.element, node, around)
    elif isinstance(pattern, list):
        for part in pattern:
            yield from _locations(part, node, around)
    elif isinstance(pattern, OpPattern):
        here = (pattern, *around)
        if node.target in pattern.targets:
            yield here
        for part in pattern.parts:
            yield from _locations(part, node, here)


def _upwards(
    rule: Rule, location: _Location, node: fx.Node, program: Block, mutated: frozenset[fx.Node]
) -> Iterator[Miss]:
    """Follow the users of `node` to where the root should be, then compare from there downwards."""
    here, *around = location
    if not around:
        yield _at_root(rule, here, node, program, mutated)
        return
    wanted = around[0]
    users = list(node.users)
    fitting = [user for user in users if user.target in wanted.targets]
    if not fitting:
        met = list(dict.fromkeys(_name(user) for user in users)) or ["nothing"]
        deep = len(rule.pattern.inner()) - len(around)
        found = f"its user is {met[0]}" if len(met) == 1 else f"its users are {' and '.join(met)}"
        yield Miss(deep, f"matched {_name(node)}, but {found}, not {wanted}")
    for user in fitting:
        yield from _upwards(rule, tuple(around), user, program, mutated)


def _at_root(rule: Rule, root: OpPattern, node: fx.Node, program: Block, mutated: frozenset[fx.Node]) -> Miss:
    for match in matches_at(rule, node, program):
        why_not = objection(rule, match, mutated, program)
        return Miss(len(match.nodes) + 1, f"matched, but {why_not}" if why_not else APPLIES)
    for match in structural_matches_at(rule, node, program):
        view = match.view(rule, program)
        unmet = next(condition for condition in rule.when if not call_with(condition, view))
        return Miss(len(match.nodes), f"matched, but requirement not met: {reason(unmet)}")
    return _downwards(root, node, program, 1)


def _downwards(pattern: OpPattern, node: fx.Node, program: Block, matched: int) -> Miss:
    """The first argument of `node`, in depth, that is not what the pattern has there."""
    given = bound_arguments(node)
    pairs = [*zip(pattern.args, given.items()), *((part, (name, given.get(name))) for name, part in pattern.kwargs.items())]
    if node.target in COMMUTATIVE and len(pattern.args) >= 2 and not _fits_by_name(pairs[0][0], pairs[0][1][1]):
        (a, x), (b, y), *rest = pairs
        pairs = [(a, y), (b, x), *rest]
    for part, (name, value) in pairs:
        inside = [option for option in _options(part) if isinstance(option, OpPattern) and _fits_by_name(option, value)]
        if inside:
            misses = [_downwards(option, value, program, matched + 1) for option in inside]
            if all(miss.sentence for miss in misses):
                return max(misses, key=lambda miss: miss.matched)
        elif not _fits_by_name(part, value):
            sentence = f"matched {_name(node)}, but its operand {name} is {_name(value)}, not {_wanted(part)}"
            return Miss(matched, sentence)
    return Miss(matched, "")


def _options(part: Any) -> list[Any]:
    return [o for option in part.options for o in _options(option)] if isinstance(part, OneOf) else [part]


def _fits_by_name(part: Any, value: Any) -> bool:
    if isinstance(part, OneOf):
        return any(_fits_by_name(option, value) for option in part.options)
    if isinstance(part, OpPattern):
        return isinstance(value, fx.Node) and value.target in part.targets
    if isinstance(part, Each):
        return isinstance(value, (list, tuple)) and all(_fits_by_name(part.element, v) for v in value)
    if isinstance(part, list):
        same_length = isinstance(value, (list, tuple)) and len(part) == len(value)
        return same_length and all(_fits_by_name(p, v) for p, v in zip(part, value))
    if isinstance(part, Unknown):
        if value is None:
            return part.optional
        return isinstance(value, (fx.Node, list, tuple)) or part.takes_literal(value)
    return not isinstance(value, fx.Node) and bool(part == value)


def _name(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "call_function":
            return short_name(value.target)
        return {"placeholder": "an input", "get_attr": "a constant", "output": "the model's output"}[value.op]
    return f"a list of {len(value)}" if isinstance(value, (list, tuple)) else repr(value)


def _wanted(part: Any) -> str:
    if isinstance(part, Unknown):
        kinds = " or ".join(getattr(t, "__name__", str(t)) for t in part.types)
        return f"{'a constant' if kinds == 'Known' else kinds} ({part.name})"
    return f"a list of {len(part)}" if isinstance(part, Sequence) and not isinstance(part, str) else str(part)
