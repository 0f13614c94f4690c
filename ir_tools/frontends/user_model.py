"""Calling the user's model: the parameters of its `forward`, a call with bound arguments, and the model as a flat function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ir_tools.frontends.exported import exported_parameters, is_exported_module
from ir_tools.ir import Signature
from ir_tools.ir.signature import result_leaves
from ir_tools.torch_compat.jit import forward_schema


class FlatModel(nn.Module):
    """The user's model as a function from flat tensors to a list of tensors, for front ends that know only those."""

    def __init__(self, model: nn.Module, signature: Signature):
        super().__init__()
        self.model = model
        self.signature = signature

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = result_leaves(call_model(self.model, self.signature.arguments(tensors)))
        # Not every tensor is an output: a size that the model returns is a tensor under torch.jit.trace.
        return [leaf for leaf, kind in zip(leaves, self.signature.out_leaves, strict=True) if isinstance(kind, int)]


def call_model(model: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call with bound arguments (`binder`), positional-only ones, `*args` and `**kwargs` included."""
    bound = inspect.BoundArguments(inspect.Signature(forward_parameters(model)), {})  # type: ignore[arg-type]
    named = {n: p for n, p in bound.signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    bound.arguments.update((n, v) for n, v in arguments.items() if n in named)
    if any(named[n].kind is inspect.Parameter.VAR_POSITIONAL for n in bound.arguments):
        bound.apply_defaults()  # what stands before *args goes by position, so none of it may be left out
    return model(*bound.args, **bound.kwargs, **{n: v for n, v in arguments.items() if n not in named})


def forward_parameters(model: Any) -> list[inspect.Parameter]:
    """The parameters of `forward`, without self."""
    if isinstance(model, torch.jit.ScriptModule):
        parameters = []
        for a in forward_schema(model).arguments[1:]:
            default = a.default_value if a.has_default_value() else inspect.Parameter.empty
            kind = inspect.Parameter.KEYWORD_ONLY if a.kwarg_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            parameters.append(inspect.Parameter(a.name, kind, default=default))
        return parameters
    if is_exported_module(model):
        return exported_parameters(model)
    return list(inspect.signature(model.forward).parameters.values())
