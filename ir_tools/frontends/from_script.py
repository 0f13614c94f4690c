"""`torch.jit.script`, ScriptModules and `.pt` files -> Program, by a walk over the scripted graph."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from ir_tools.frontends.source import Source, finish, forward_parameters, start_draft
from ir_tools.frontends.torchscript_graph import GraphWalk
from ir_tools.frontends.torchscript_ops import flat_values
from ir_tools.ir import Program


def from_script(source: Source) -> Program:
    """Script the model (a ScriptModule is taken as it is) and walk its graph with the sizes of the first example."""
    model = source.model
    scripted = model if isinstance(model, torch.jit.ScriptModule) else torch.jit.script(model)
    draft, inputs = start_draft(source, "script")
    arguments = source.signature.arguments(inputs)
    values = [arguments.get(p.name, p.default) for p in forward_parameters(scripted)]
    values = [pytree.tree_map(lambda v: v, v) for v in values]
    result = GraphWalk(draft).run(scripted, values)
    return finish(draft, flat_values(draft, result, source.signature.out_tree))
