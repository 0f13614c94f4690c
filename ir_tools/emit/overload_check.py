"""Check of the compiled text: the overloads that TorchScript resolved must be those of the Program."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.jit import ScriptModule

from ir_tools.emit.emitted_text import Statement
from ir_tools.errors import EmitError
from ir_tools.ir.effects import has_effect, written_nodes
from ir_tools.ir.host import TENSOR_READS
from ir_tools.ir.provenance import location
from ir_tools.torch_compat.operators import schema_or


def check_overloads(scripted: ScriptModule, method: str, statements: list[Statement]) -> None:
    """Raise EmitError unless every call of a compiled chunk means the Program's overload."""
    calls = [call for statement in statements for call in statement.calls]
    schemas = list(_resolved_schemas(getattr(scripted, method).graph))
    # A write into memory that is never read is dropped too, with whatever it alone needs.
    writes_inside = any(call.inside and written_nodes(call.node) for call in calls)
    at = 0
    for call in calls:
        schema = schemas[at] if at < len(schemas) else "nothing (the call is gone)"
        if schema.split("(", 1)[0] == call.expected:
            at += 1
        elif not writes_inside and (not call.inside or has_effect(call.node)):
            wanted = schema_or(call.node.target, call.expected)
            raise EmitError(
                f"TorchScript reads {call.node.name} (at {location(call.node)}) differently than it is meant\n"
                f"  meant: {wanted}\n  read:  {schema}\n  text:  {call.text}"
            )
    if at < len(schemas):
        raise EmitError(f"{method} holds a call that the Program does not have: {schemas[at]}")


def _resolved_schemas(graph: Any) -> Iterator[str]:
    """The schemas of a chunk's calls of ops on tensors, in order, those in ifs and loops among them."""
    for node in graph.nodes():
        if node.kind() == "prim::CallMethod":
            yield f"self.{node.s('name')}"
        for block in node.blocks():
            yield from _resolved_schemas(block)
        if node.kind().startswith("prim::"):
            continue
        schema = node.schema()
        if node.kind() not in TENSOR_READS and "Tensor" in schema:
            yield schema
