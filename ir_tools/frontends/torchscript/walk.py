"""The walk over a TorchScript graph, traced or scripted, in order: what is known now is computed, the rest becomes nodes.

What a node means is looked up in the registry; a node without a handler is the operator of its schema.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ir_tools.errors import CaptureError, first_line
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import constant_value, where
from ir_tools.frontends.torchscript.operators import call_operator, storage_of
from ir_tools.frontends.torchscript.registry import BLOCK_HANDLERS, HANDLERS, TAKES_TEXT
from ir_tools.frontends.torchscript.values import NeedsNode, Raised, TextOfData


def walk_block(env: Environment, block: Any) -> None:
    for node in block.nodes():
        walk_node(env, node)


def walk_node(env: Environment, node: Any) -> None:
    kind = node.kind()
    if kind == "prim::Constant":
        value = constant_value(node)
        if isinstance(value, torch.Tensor):
            env.literals.add(storage_of(value))
        _set(env, node, value)
        return
    if kind in BLOCK_HANDLERS:
        BLOCK_HANDLERS[kind](env, node)
        return
    arguments = [env.value(v) for v in node.inputs()]
    if kind not in TAKES_TEXT and any(isinstance(a, TextOfData) for a in arguments):
        raise CaptureError(f"{kind}{where(node)} uses a string with runtime values in it, which is not supported")
    handler = HANDLERS.get(kind)
    with env.draft.origin(env.origin(node, arguments)):
        try:
            if handler is not None:
                result = handler(env, node, arguments)
                if result is not NotImplemented:
                    _set(env, node, result)
                    return
            _set(env, node, call_operator(env, node, arguments))
        except (Raised, CaptureError, NeedsNode):
            raise
        except Exception as error:
            raise CaptureError(f"{kind}{where(node)}: {first_line(error)}") from error


def _set(env: Environment, node: Any, result: Any) -> None:
    outputs = list(node.outputs())
    if len(outputs) == 1:
        env.bind(outputs[0], result)
    elif outputs:
        for value, part in zip(outputs, result, strict=True):
            env.bind(value, part)


def enter_round(env: Environment, body: Any, count: Any, carried: Sequence[Any]) -> None:
    """Bind the inputs of a loop's body for round number `count`."""
    iteration, *body_inputs = body.inputs()
    env.values[iteration.debugName()] = count
    for value, part in zip(body_inputs, carried, strict=True):
        env.bind(value, part)
