"""What is asked of a node of a TorchScript graph: its constant, its source line, its overload, how many it holds."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch._ops import OpOverload

from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.fx_graph import source_line
from ir_tools.frontends.torchscript.values import NUMBER_OF_DTYPE


def count_nodes(block: Any) -> int:
    """The nodes of a TorchScript block, nested ones included."""
    return sum(1 + sum(count_nodes(inner) for inner in node.blocks()) for node in block.nodes())


def where(node: Any) -> str:
    line = source_line(node.sourceRange())
    return f" (at {line})" if line else ""


def constant_value(node: Any) -> Any:
    (output,) = node.outputs()
    value = output.toIValue() if node.hasAttribute("value") else None
    return NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


@lru_cache(maxsize=4096)
def overload_of(schema: str, kind: str, at: str) -> OpOverload:
    """The overload behind a node, from its printed schema."""
    match = re.match(r"(\w+)::(\w+)(?:\.(\w+))?\(", schema)
    if match is None:
        raise CaptureError(f"{kind} has no operator schema{at}; it cannot be captured")
    namespace, name, overload = match.groups()
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    except AttributeError as error:
        raise CaptureError(f"the operator {namespace}::{name} is not registered in this process{at}") from error
