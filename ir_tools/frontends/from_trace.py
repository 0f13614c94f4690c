"""`torch.jit.trace` -> Program, by a walk over the traced graph."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

from ir_tools.frontends.capture_draft import finish, start_draft
from ir_tools.frontends.source import Source
from ir_tools.frontends.torchscript.forward import walk_forward
from ir_tools.frontends.torchscript.outputs import flat_values
from ir_tools.frontends.undisturbed import undisturbed
from ir_tools.frontends.user_model import FlatModel
from ir_tools.ir import Program


def from_trace(source: Source) -> Program:
    """Trace the model on the first example. Loops and branches are those that this example took."""
    flat = FlatModel(source.model, source.signature).eval()
    copies = tuple(t.clone() for t in source.tensors)
    with undisturbed(source.model):  # tracing runs the model, which may move its state; the walk starts from the state given
        traced = torch.jit.trace(flat, copies, check_trace=False, strict=False)
    draft, inputs = start_draft(source, "trace")
    result = walk_forward(draft, traced, list(inputs), prefix="model.")
    return finish(draft, flat_values(draft, result, pytree.tree_structure([0] * source.signature.output_count)))
