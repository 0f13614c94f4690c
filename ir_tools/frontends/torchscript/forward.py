"""Where a walk starts: a ScriptModule's `forward` on arguments, with every handler registered."""

from __future__ import annotations

from typing import Any

import torch

from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.handlers import (  # noqa: F401  # each of these files registers its handlers
    attributes,
    containers,
    control_flow,
    conversions,
    messages,
    tensor_facts,
    type_checks,
)
from ir_tools.frontends.torchscript.values import ModuleValue, Raised
from ir_tools.frontends.torchscript.walk import walk_block
from ir_tools.ir import Draft


def walk_forward(draft: Draft, scripted: torch.jit.ScriptModule, arguments: list[Any], prefix: str = "") -> Any:
    """The value that `forward` returns on `arguments` (nodes and Python values), as a Python structure; adds nodes to `draft`.

    `prefix` is cut from module paths.
    """
    env = Environment(draft, prefix)
    graph = scripted.inlined_graph
    inputs = list(graph.inputs())
    if len(inputs) != len(arguments) + 1:
        raise CaptureError(f"forward takes {len(inputs) - 1} arguments, {len(arguments)} are known")
    env.values[inputs[0].debugName()] = ModuleValue(scripted, "")
    env.mark_arguments(arguments)
    for value, given in zip(inputs[1:], arguments, strict=True):
        env.bind(value, given)
    try:
        walk_block(env, graph)
    except Raised as error:
        raise CaptureError(f"the model raises for these inputs: {error}") from None
    results = [env.values[v.debugName()] for v in graph.outputs()]
    return results[0] if len(results) == 1 else tuple(results)
