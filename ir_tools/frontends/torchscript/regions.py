"""An If or Loop on a runtime value becomes a region.

Its blocks are walked in frames of their own, whose drafts become the region's bodies; what they use from outside becomes an
operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.functionalize import functionalize
from ir_tools.frontends.torchscript.environment import Environment, Frame
from ir_tools.frontends.torchscript.nodes import where
from ir_tools.frontends.torchscript.values import UNINITIALIZED, Raised, from_leaves, is_tensor_type, leaf_types, type_leaves
from ir_tools.frontends.torchscript.walk import enter_round, walk_block
from ir_tools.ir import facts, joins
from ir_tools.ir.host import fail
from ir_tools.ir.program import body_of
from ir_tools.ir.regions import Body, region_if, region_loop

aten = torch.ops.aten

MOST_ATTEMPTS = 16
"""Attempts at a fixed point of the facts of loop-carried values; each one assumes less than the one before."""
NO_LIMIT = 1 << 62
"""From this trip count on a loop has no limit but its condition."""


def if_as_region(env: Environment, node: Any, condition: fx.Node) -> None:
    """Both sides, each in a frame of its own, and what they give as one value or as a slot of the region."""
    env.region_count += 1
    frames, results = [], []
    for block, name in zip(node.blocks(), ("then", "else"), strict=True):
        with env.new_frame(f"if{env.region_count}_{name}_") as frame:
            frames.append(frame)
            results.append(_results_of(env, block))
    if all(result is None for result in results):
        raise Raised(f"both sides of an if raise{where(node)}")
    slots: list[_Slot] = []
    plans = []
    for i, value in enumerate(node.outputs()):
        sides = [None if r is None else type_leaves(r[i], value.type()) for r in results]
        pairs = zip(_pairs(sides), leaf_types(value.type()), strict=True)
        plans.append([condition if a is True and b is False else _slot(env, a, b, t, slots) for (a, b), t in pairs])
    parts: list[list[Any]] = []
    for side, frame in enumerate(frames):
        with env.inside(frame):
            given = [slot.sides[side] for slot in slots]
            parts.append([_result(env, v, s.annotation) for v, s in zip(given, slots, strict=True)])
    mode = env.draft.program.mode
    values = [_join(mode, a, b, slot.annotation) for a, b, slot in zip(*parts, slots, strict=True)]
    operands = list(dict.fromkeys(outer for frame in frames for outer in frame.operands))
    made = [_close(env, frame, operands, part) for frame, part in zip(frames, parts, strict=True)]
    nodes: list[fx.Node] = []
    if slots or any(body.effects.matter for body in made):
        with env.draft.origin(env.origin(node, [])):
            types = [s.annotation for s in slots]
            nodes = env.draft.region(region_if, [env.here(condition), *made, operands], values, types)
    for value, plan in zip(node.outputs(), plans, strict=True):
        leaves = iter([nodes[leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in plan])
        env.bind(value, from_leaves(value.type(), leaves))


def _results_of(env: Environment, block: Any) -> list[Any] | None:
    """What a block gives, None when it raises."""
    try:
        walk_block(env, block)
    except Raised as error:
        env.draft.call(fail, str(error))
        return None
    return [env.values[v.debugName()] for v in block.outputs()]


def _slot(env: Environment, one: Any, other: Any, annotation: str, slots: list[_Slot]) -> Any:
    """One value where both sides of an if agree, else a slot among its results."""
    for value, unused in ((one, other), (other, one)):
        if unused is UNINITIALIZED and not env.is_local(value):
            return value
    if _same(one, other):
        return one
    slots.append(_Slot(len(slots), (one, other), annotation))
    return slots[-1]


def _result(env: Environment, value: Any, annotation: str) -> Any:
    """A value as a result of the body under construction."""
    if value is UNINITIALIZED:
        return None
    return env.as_argument(value, annotation)


def _close(
    env: Environment,
    frame: Frame,
    operands: Sequence[fx.Node],
    results: Sequence[Any],
    before: Sequence[fx.Node] = (),
    carried: int = 0,
) -> Body:
    """The finished body: placeholders are `before`, then one for each of `operands`, in this order."""
    draft = frame.draft
    placeholders = [*before, *(frame.operand(n) for n in operands)]
    draft.output(results)
    functionalize(draft)
    draft.finish()
    for placeholder in reversed(placeholders):
        first = next(iter(draft.graph.nodes))
        if first is not placeholder:
            first.prepend(placeholder)
    return body_of(draft.program, carried)


def loop_as_region(env: Environment, node: Any, done: int) -> None:
    """The rounds from number `done` on, for values that go by the names of the loop's inputs."""
    trips, condition, *given = (env.value(v) for v in node.inputs())
    (block,) = node.blocks()
    iteration, *inputs = block.inputs()
    types = [t for v in inputs for t in leaf_types(v.type())]
    leaves = [leaf for v, value in zip(inputs, given, strict=True) for leaf in type_leaves(value, v.type())]
    carried = [_result(env, leaf, t) for leaf, t in zip(leaves, types, strict=True)]
    mode = env.draft.program.mode
    assumed = [_slot_fact(mode, value, t) for value, t in zip(carried, types, strict=True)]
    free: set[Any] = set()
    for attempt in count():
        if attempt == MOST_ATTEMPTS:
            raise CaptureError(f"the shapes of loop-carried values do not settle in {MOST_ATTEMPTS} rounds{where(node)}")
        env.region_count += 1
        widened = joins.Elements.widened
        with env.new_frame(f"loop{env.region_count}_") as frame:
            number = frame.draft.operand("round", mode.unknown_number("int"), "int")
            operands = [
                frame.draft.operand(f"carried{i}", known, t) for i, (known, t) in enumerate(zip(assumed, types, strict=True))
            ]
            parts = iter(operands)
            enter_round(
                env, block, frame.draft.call(aten.add.int, number, done) if done else number,
                [from_leaves(v.type(), parts) for v in inputs],
            )  # fmt: skip
            results = _results_of(env, block)
            if results is None:
                results = [False, *(from_leaves(v.type(), iter(operands)) for v in inputs)]
            after = [leaf for v, r in zip(inputs, results[1:], strict=True) for leaf in type_leaves(r, v.type())]
            after = [_result(env, leaf, t) for leaf, t in zip(after, types, strict=True)]
            goes_on = env.here(results[0])
            found = [_slot_fact(mode, value, t) for value, t in zip(after, types, strict=True)]
        wider = [
            joins.join(mode, fact, other, free) if is_tensor_type(t) else _same_elements(fact, other)
            for fact, other, t in zip(assumed, found, types, strict=True)
        ]
        if all(a == b for a, b in zip(wider, assumed, strict=True)) and joins.Elements.widened == widened:
            if facts.ABSENT not in wider:
                break
            wider = [facts.UNKNOWN if known is facts.ABSENT else known for known in wider]  # None in every round
        assumed = wider
    body = _close(env, frame, list(frame.operands), [goes_on, *after], [number, *operands], len(operands))
    limit = None if isinstance(trips, int) and trips >= NO_LIMIT else trips
    if done and limit is not None:
        limit = env.draft.call(aten.sub.int, limit, done) if isinstance(limit, fx.Node) else limit - done
    values = [_after_loop(mode, known, t, free) for known, t in zip(assumed, types, strict=True)]
    with env.draft.origin(env.origin(node, [])):
        nodes = env.draft.region(region_loop, [limit, condition, body, carried, list(frame.operands)], values, types)
    parts = iter(nodes)
    for value in node.outputs():
        env.bind(value, from_leaves(value.type(), parts))


@dataclass(frozen=True, eq=False)
class _Slot:
    """One result of an if: what each side gives, and its TorchScript type."""

    index: int
    sides: tuple[Any, Any]
    annotation: str


def _pairs(sides: Sequence[list[Any] | None]) -> list[tuple[Any, Any]]:
    """The leaves of both sides; a side that raises gives nothing that is used."""
    one, other = sides
    if one is None:
        return [(UNINITIALIZED, v) for v in other or ()]
    return list(zip(one, [UNINITIALIZED] * len(one) if other is None else other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (bool, int, float, str, torch.device)
    return type(one) is type(other) and isinstance(one, plain) and one == other


def _slot_fact(mode: Any, value: Any, annotation: str) -> Any:
    """What is known of a value that a region hands on: a tensor's fact (where it is one), a symbol for a number."""
    if not is_tensor_type(annotation):
        return facts.fact(value) if annotation.startswith(("List[", "Dict[")) else mode.unknown_number(annotation)
    return facts.ABSENT if value is None else facts.fact(value)


def _after_loop(mode: Any, known: Any, annotation: str, free: set[Any]) -> Any:
    """What is known of a carried value when the loop is over."""
    if is_tensor_type(annotation):
        return joins.fresh(mode, known, free)
    return known if isinstance(known, joins.Elements) else mode.unknown_number(annotation)


def _same_elements(one: Any, other: Any) -> Any:
    """The fact of a number stays its symbol; that of a container is lost where a round replaces it by another."""
    return facts.UNKNOWN if isinstance(one, joins.Elements) and other is not one else one


def _join(mode: Any, one: Any, other: Any, annotation: str) -> Any:
    """What is known of a result of an if."""
    known = [_slot_fact(mode, value, annotation) for value in (one, other)]
    if is_tensor_type(annotation):
        return joins.join(mode, *known)
    return known[0] if known[0] is known[1] else mode.unknown_number(annotation)
