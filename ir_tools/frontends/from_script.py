"""`torch.jit.script`, ScriptModules and `.pt` files -> Program, by a walk over the scripted graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ir_tools.frontends.capture_draft import finish, start_draft
from ir_tools.frontends.source import Source
from ir_tools.frontends.torchscript.forward import walk_forward
from ir_tools.frontends.torchscript.outputs import flat_values
from ir_tools.frontends.user_model import forward_parameters
from ir_tools.ir import Program
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.jit import own_class_table


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
    """Compile attention without its fast path, which gives other numbers and uses ops that no pass knows.

    TorchScript ignores the switch: code that it compiles has the fast path always on. So the function that reads the switch
    is replaced meanwhile, and what is compiled with it stays out of torch's table of compiled classes, from which the user's
    own scripted models take theirs.
    """
    mha, asked = torch.backends.mha, torch.backends.mha.get_fastpath_enabled
    mha.get_fastpath_enabled = no
    try:
        with own_class_table():
            yield
    finally:
        mha.get_fastpath_enabled = asked
