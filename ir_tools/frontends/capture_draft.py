"""What every front end fills: a draft that starts with the source's inputs, and is closed into a finished Program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.conditions import unique
from ir_tools.frontends.functionalize import functionalize
from ir_tools.frontends.source import Source
from ir_tools.frontends.symbols import Symbols
from ir_tools.ir import Draft, Program, check_wellformed
from ir_tools.ir.facts import fact, set_fact
from ir_tools.ir.joins import settle
from ir_tools.ir.provenance import number_calls
from ir_tools.ir.regions import all_nodes
from ir_tools.ir.signature import Condition


class Capture(Draft[Program]):
    """A draft that a front end fills, and the symbols that stand for dynamic sizes in it."""

    def __init__(self, program: Program):
        super().__init__(program)
        self.symbols = Symbols(program.mode)


def start_draft(source: Source, frontend: str) -> tuple[Capture, list[fx.Node]]:
    """An empty draft with the placeholders of the source's signature."""
    draft = Capture(Program(fx.Graph(), signature=source.signature, frontend=frontend))
    nodes = [
        draft.placeholder("".join(c if c.isalnum() else "_" for c in spec.name), draft.symbols.fake(spec, tensor))
        for spec, tensor in zip(source.signature.inputs, source.tensors, strict=True)
    ]
    return draft, nodes


def finish(draft: Capture, outputs: Sequence[Any], conditions: Sequence[Condition] = ()) -> Program:
    """Close a draft that a front end filled: outputs, functionalization, sweeping, the contract.

    `conditions` on dynamic sizes are those that the front end itself found.
    """
    values = [draft.constant("constant", v) if isinstance(v, torch.Tensor) else v for v in outputs]
    if len(values) != draft.program.signature.output_count:
        raise CaptureError(f"the captured graph gives {len(values)} tensors, the model {draft.program.signature.output_count}")
    draft.output(values)
    functionalize(draft)
    program = draft.finish()
    settle(all_nodes(program.graph))
    for node in all_nodes(program.graph):  # what was found out late about symbols: that two are equal
        set_fact(node, program.mode.settled(fact(node)))
    number_calls(program.graph)
    for name in program.state:  # nobody else may move it
        program.constants[name] = program.constants[name].clone()
    found = unique((*conditions, *draft.symbols.conditions()))
    program.signature = replace(program.signature, conditions=found)
    check_wellformed(program)
    return program
