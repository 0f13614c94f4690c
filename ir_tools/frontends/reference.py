"""The reference: the outputs of the user's own model, run eagerly and left as found.

A model whose outputs no captured graph could give is refused here.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from ir_tools.errors import CaptureError
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.frontends.user_model import call_model
from ir_tools.ir.signature import result_leaves, split_leaves
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode
from ir_tools.torch_compat.jit import module_from_bytes, module_to_bytes
from ir_tools.torch_compat.modules import own_buffers
from ir_tools.verify.numerics import compare


class Reference:
    """The model that gives the reference: the user's own, or for TorchScript a copy that runs without torch's optimiser.

    That optimiser (torch 2.13) drops writes into tensors that a list holds. It is switched off for a copy because a graph keeps
    the mode that it first ran in.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.unoptimised = False
        if isinstance(model, torch.jit.ScriptModule):
            try:
                self.model = module_from_bytes(module_to_bytes(model)).eval()
                self.unoptimised = True
            except RuntimeError:  # a model that cannot be saved (it calls back into Python) is its own reference
                self.model = model

    def answer(self, arguments: dict[str, Any]) -> Any:
        with torch.jit.optimized_execution(False) if self.unoptimised else contextlib.nullcontext():
            return answer(self.model, arguments)


def answer(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """What the user's model gives on one call, run eagerly, leaving no trace. Inputs written by the model are copies.

    Raises `CaptureError` for what no front end can see: state kept in attributes, numbers read out of tensors.
    """

    def run() -> Any:
        with seeded():
            result = call_model(model, pytree.tree_map_only(torch.Tensor, torch.clone, arguments))
        # A result may be a buffer, which is put back when this is over.
        return pytree.tree_map_only(torch.Tensor, torch.clone, result)

    with undisturbed(model):
        before, plain = _attributes(model), _plain_state(model)
        result = run()
        if (once := _plain_state(model)) != plain:
            again = run()
            # An attribute that only remembers (the last size) is the same after a second run; a log that grows is harmless
            # as long as the outputs stay the same.
            moving = sorted(name for name, value in _plain_state(model).items() if value != once.get(name))
            grows_only = all(isinstance(once.get(name), (list, dict)) for name in moving)
            if moving and not (grows_only and _same_answer(result, again) and _same_answer(result, run())):
                raise CaptureError(
                    f"forward keeps state in self.{', self.'.join(moving)}, which changes from call to call: keep such state "
                    "in a buffer and write into it in place (self.n.add_(1), self.cache.copy_(new))"
                )
        assigned = sorted(name for name, value in _attributes(model).items() if before.get(name) is not value)
        if assigned and not _same_answer(result, run()):
            raise CaptureError(
                f"the model's answer changes from call to call, and forward assigns self.{', self.'.join(assigned)}: "
                "keep such state in a buffer and write into it in place (self.n.add_(1), self.cache.copy_(new))"
            )
    numbers = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, (int, float, complex))]
    if numbers:
        with undisturbed(model), _NumbersRead() as read:
            run()
        if read.count:
            raise CaptureError(
                f"the model returns the number {numbers[0]!r} and reads numbers out of tensors (item(), int(), float()): "
                "a number cannot follow the data in a compiled model; return a tensor in its place"
            )
    return result


class _NumbersRead(TorchDispatchMode):
    """Counts how often a number is read out of a tensor."""

    count = 0

    def __torch_dispatch__(self, target: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.count += target is torch.ops.aten._local_scalar_dense.default
        return target(*args, **(kwargs or {}))


def _attributes(model: nn.Module) -> dict[str, Any]:
    """Every attribute and buffer of the modules by path, but not TorchScript's, which its front end watches."""
    if isinstance(model, torch.jit.ScriptModule):
        return {}
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), *own_buffers(module).items())
    }


_OF_TORCH = frozenset(vars(nn.Module()))


def _plain_state(model: nn.Module) -> dict[str, Any]:
    """What attributes hold that are no tensors: numbers, strings, and how long containers are and what is in them."""
    if isinstance(model, torch.jit.ScriptModule):
        return {}
    return {
        f"{path}.{name}".lstrip("."): _plain(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_TORCH
    }


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return len(value) if isinstance(value, (set, frozenset)) else type(value).__name__


def _same_answer(first: Any, second: Any) -> bool:
    (one, tensors), (two, others) = (split_leaves(result_leaves(result)) for result in (first, second))
    return one == two and compare(tensors, others).equal
