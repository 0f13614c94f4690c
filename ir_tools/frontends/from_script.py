"""`torch.jit.script`, ScriptModules and `.pt` files -> Program, by a walk over the scripted graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.jit import _recursive
from torch.utils import _pytree as pytree

from ir_tools.frontends.capture_draft import finish, start_draft
from ir_tools.frontends.source import Source
from ir_tools.frontends.torchscript.forward import walk_forward
from ir_tools.frontends.torchscript.outputs import flat_values
from ir_tools.frontends.user_model import forward_parameters
from ir_tools.ir import Program


def from_script(source: Source) -> Program:
    """Script the model (a ScriptModule is taken as it is) and walk its graph with the sizes of the first example."""
    model = source.model
    scripted = model if isinstance(model, torch.jit.ScriptModule) else script(model)
    draft, inputs = start_draft(source, "script")
    arguments = source.signature.arguments(inputs)
    values = [arguments.get(p.name, p.default) for p in forward_parameters(scripted)]
    values = [pytree.tree_map(lambda v: v, v) for v in values]
    result = walk_forward(draft, scripted, values)
    return finish(draft, flat_values(draft, result, source.signature.out_tree))


def script(model: nn.Module) -> torch.jit.ScriptModule:
    """The model as TorchScript, its attention computed as the other front ends record it."""
    with fast_paths_off() if any(isinstance(m, ATTENTION) for m in model.modules()) else contextlib.nullcontext():
        return torch.jit.script(model)


ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""The modules that ask for the switch of the fast path."""


def no() -> bool:
    return False


@contextlib.contextmanager
def fast_paths_off() -> Iterator[None]:
    """Compile attention without its fast path, whose numbers are others and whose ops no pass knows.

    TorchScript does not see the switch: what it compiles has the fast path always on. So another function answers for the
    switch meanwhile, and what is compiled with it stays out of torch's table of compiled classes, from which the user's own
    scripted models take theirs.
    """
    mha, asked, compiled = torch.backends.mha, torch.backends.mha.get_fastpath_enabled, _recursive.concrete_type_store
    mha.get_fastpath_enabled, _recursive.concrete_type_store = no, _recursive.ConcreteTypeStore()
    try:
        yield
    finally:
        mha.get_fastpath_enabled, _recursive.concrete_type_store = asked, compiled
