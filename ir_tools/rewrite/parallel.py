"""Linears side by side: those that read one value, and what keeps one from being joined with others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from ir_tools.ir import Block, Draft, alias_analysis, facts
from ir_tools.ir.dialect import aten, bound_arguments, getitem, short_name
from ir_tools.ir.program import public_name
from ir_tools.ir.provenance import record, stand_for
from ir_tools.rewrite.rule import FAMILIES


def side_by_side(block: Block) -> Iterator[list[fx.Node]]:
    """The linears that read one value, two at least, in order of execution: one list for each value."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in block.calls:
        if node.target is aten.linear.default and node.users:
            groups.setdefault(bound_arguments(node)["input"], []).append(node)
    yield from (group for group in groups.values() if len(group) > 1)


def why_alone(node: fx.Node, block: Block, mutated: frozenset[fx.Node], layout_is_observable: bool) -> str | None:
    """Why a linear cannot be computed as a part of a wider one, None when it can."""
    given = bound_arguments(node)
    x, w, b = given["input"], given["weight"], given["bias"]
    if any(value in mutated for value in (node, x, w, b)):
        return "its operands or result are written in place"
    if layout_is_observable:
        return "the graph writes in place or draws at random, so that it matters how a part of a larger tensor lies in memory"
    if block.constant(w) is None or (b is not None and block.constant(b) is None):
        return "its weight and bias are not constants known now"
    if facts.rank(w) != 2 or facts.rank(node) is None:
        return "its weight has no second axis, or nothing is known of its result"
    if alias_analysis.is_handed_out(alias_analysis.derived(node)):
        return "its result is the model's output, which must not be a part of a larger tensor"
    user = _fusing_user(node)
    if user is not None:
        return f"its user {short_name(user.target)} would fuse into it, which is worth more"
    return None


def _fusing_user(node: fx.Node) -> fx.Node | None:
    """The only user of `node`, if that is an activation or a sum of two values of one shape."""
    user, *others = node.users
    if others or user.op != "call_function":
        return None
    summed = user.target is aten.add.Tensor and facts.shape(user) == facts.shape(node)
    return user if summed or user.target in FAMILIES["activation"] else None


def kind_of(node: fx.Node, block: Block) -> tuple:
    """Equal for linears whose weights can be joined: dtype, device and layout."""
    weight = bound_arguments(node)["weight"]
    constant = block.constants[str(weight.target)]
    return constant.dtype, constant.device, constant.layout


def merge(draft: Draft, linears: list[fx.Node], made_by: str) -> None:
    """One linear in place of the first of `linears`, split into what each of them gave."""
    first, constants = linears[0], draft.program.constants
    given = [bound_arguments(node) for node in linears]
    weights = [constants[str(g["weight"].target)] for g in given]
    biases = [None if g["bias"] is None else constants[str(g["bias"].target)] for g in given]
    base = public_name(str(given[0]["weight"].target))
    with draft.before(first, made_by):
        w = draft.constant(f"{base}@{made_by}", joined(weights))
        b = None
        if any(bias is not None for bias in biases):
            parts = [w.new_zeros(w.shape[0]) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
            b = draft.constant(f"{base}@{made_by}_bias", joined(parts))
        wide = draft.call(aten.linear.default, given[0]["input"], w, b)
        stand_for(wide, linears, made_by)
        sizes = [weight.shape[0] for weight in weights]
        split = draft.call(aten.split_with_sizes.default, wide, sizes, -1)
        for i, node in enumerate(linears):
            with draft.origin(record(node).derived(made_by)):
                part = draft.call(getitem, split, i)
            draft.redirect(node, part)


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Along the first axis, that of the features that come out."""
    return torch.cat(tensors)
