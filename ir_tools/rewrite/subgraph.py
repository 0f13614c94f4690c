"""A subgraph as its kernels see it: what enters it, by name, as attributes; and what may stand in its place."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from types import SimpleNamespace
from typing import Any

from ir_tools.ir.dialect import bound_arguments, short_name
from ir_tools.ir.prepack import mark_prepacks
from ir_tools.rewrite.apply import MOST_MATCHES, changes, objection
from ir_tools.rewrite.build import Ops
from ir_tools.rewrite.match import matches_at
from ir_tools.rewrite.rule import Call, Rule, Value, wrap


def arguments_of(call: Call) -> SimpleNamespace:
    """One op: its `target`, and its arguments by their schema names."""
    return SimpleNamespace(target=call.target, **{name: wrap(value) for name, value in bound_arguments(call._node).items()})


def subgraph_at(op: Ops, rule: Rule, call: Call) -> tuple[SimpleNamespace | None, str]:
    """What the unknowns of the rule's left side stand for where it fits at `call`; else None, and why the nearest fit is none.

    The reason is empty where the ops are others.
    """
    program, first_reason = op._draft.program, ""
    for match in islice(matches_at(rule, call._node, program), MOST_MATCHES):
        why_not = objection(rule, match, op._shared.mutated, program)
        if why_not is None:
            view = match.view(rule, program)
            return SimpleNamespace(**{name: view[name] for name in rule.unknowns}), ""
        first_reason = first_reason or why_not
    return None, first_reason


def why_not_in_place_of(call: Call, new: Value, keeps_layout: bool) -> str | None:
    """The first fact of `call` that `new` does not keep; None when it keeps all."""
    return changes(call._node, new._node, keeps_layout)


def prepacked_by(op: Ops, prepack: Collection[Any]) -> str | None:
    """Make what `op` built of `prepack` prepack ops. Says why not where one of them would run in every call."""
    left = mark_prepacks(op.made, prepack)
    if left is None:
        return None
    return f"{short_name(left.target)} prepares constants, and here it is given what is known at run time only"


def take_back(op: Ops) -> None:
    """Remove what `op` built, of which nothing else reads anything."""
    while op.made:
        op._draft.graph.erase_node(op.made.pop())


def site_of(op: Ops, call: Call) -> str:
    """The site id of what a table builds for `call`."""
    return f"{op._made_by}@{call._node.name}"
