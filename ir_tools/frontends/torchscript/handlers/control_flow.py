"""Ifs and loops: those on known values are resolved and unrolled, the others become regions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import count_nodes, where
from ir_tools.frontends.torchscript.regions import NO_LIMIT, if_as_region, loop_as_region
from ir_tools.frontends.torchscript.registry import handles_blocks
from ir_tools.frontends.torchscript.values import NeedsNode, Raised
from ir_tools.frontends.torchscript.walk import enter_round, walk_block
from ir_tools.ir import facts

LARGEST_UNROLLED = 20_000
"""Nodes of TorchScript that unrolling a loop may give; a longer one stays a loop."""


@handles_blocks("prim::If")
def _if(env: Environment, node: Any) -> None:
    condition = env.value(next(iter(node.inputs())))
    known = facts.holds_always(facts.fact(condition)) if isinstance(condition, fx.Node) else bool(condition)
    if known is None:
        _retried(env, lambda: if_as_region(env, node, condition))
        return
    taken = list(node.blocks())[0 if known else 1]
    walk_block(env, taken)
    for value, result in zip(node.outputs(), taken.outputs(), strict=True):
        env.bind(value, env.values[result.debugName()])


@handles_blocks("prim::Loop")
def _loop(env: Environment, node: Any) -> None:
    (body,) = node.blocks()
    trips, condition, *carried = (env.value(v) for v in node.inputs())
    if isinstance(trips, int) and trips < NO_LIMIT and trips * count_nodes(body) > LARGEST_UNROLLED:
        _retried(env, lambda: loop_as_region(env, node, 0))
        return
    count = 0
    while True:
        if isinstance(condition, fx.Node):
            known = facts.holds_always(facts.fact(condition))
            condition = condition if known is None else known
        unknown = isinstance(condition, fx.Node) or isinstance(trips, fx.Node)
        if unknown or (count == 0 and condition and _stops_by_data(env, body, carried)):
            _remaining(env, node, count, condition, carried)
            return
        if not condition or count >= trips:
            break
        if count * count_nodes(body) > LARGEST_UNROLLED:
            raise CaptureError(f"a loop runs more than {count} times{where(node)}")
        enter_round(env, body, count, carried)
        walk_block(env, body)
        condition, *carried = (env.value(v) for v in body.outputs())
        count += 1
    for value, part in zip(node.outputs(), carried, strict=True):
        env.bind(value, part)


def _remaining(env: Environment, node: Any, count: int, condition: Any, carried: Sequence[Any]) -> None:
    """The rounds from `count` on as a region. What they start from goes by the names of the loop's inputs."""
    if count:
        inputs = list(node.inputs())
        for value, part in zip(inputs[1:], (condition, *carried), strict=True):
            env.values[value.debugName()] = part
    _retried(env, lambda: loop_as_region(env, node, count))


def _stops_by_data(env: Environment, body: Any, carried: Sequence[Any]) -> bool:
    """The loop's condition is a runtime value: found by walking one round on copies, which are thrown away."""
    goes_on = next(iter(body.outputs()))
    if goes_on.node().kind() == "prim::Constant":
        return False
    values, containers = dict(env.values), dict(env.containers)
    try:
        with env.new_frame("trial_"):
            copies: dict[int, Any] = {}
            env.values = {name: env.copied(value, copies) for name, value in values.items()}
            enter_round(env, body, 0, [env.copied(value, copies) for value in carried])
            walk_block(env, body)
            result = env.value(goes_on)
            return isinstance(result, fx.Node) and facts.holds_always(facts.fact(result)) is None
    except (Raised, CaptureError):
        return False  # it comes again, where it counts
    finally:
        env.values, env.containers = values, containers


def _retried(env: Environment, build: Callable[[], None]) -> None:
    """Walk a region; where it needs a container of this frame as a node, make that and walk it again."""
    while True:
        try:
            build()
            return
        except NeedsNode as need:
            if env.containers[id(need.container)].depth != len(env.frames) - 1:
                raise
            env.made_node(need.container)
