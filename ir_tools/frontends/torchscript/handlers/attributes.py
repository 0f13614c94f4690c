"""Attributes of modules and of objects of TorchScript classes, read and set."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import where
from ir_tools.frontends.torchscript.registry import handles
from ir_tools.frontends.torchscript.values import ATTRIBUTE, NUMBER_OF_DTYPE, Container, ModuleValue, ObjectValue
from ir_tools.ir.effects import written_nodes
from ir_tools.torch_compat.jit import wraps_script_object


@handles("prim::GetAttr")
def _get_attr(env: Environment, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], ObjectValue):
        return a[0].attributes[node.s("name")]
    return get_attribute(env, a[0], node.s("name"))


@handles("prim::CreateObject")
def _create_object(env: Environment, node: Any, a: list[Any]) -> Any:
    return ObjectValue(len(env.frames) - 1)


@handles("prim::SetAttr")
def _set_attr(env: Environment, node: Any, a: list[Any]) -> Any:
    """`self.n += 1` writes in place and then sets the attribute to itself; anything else rebinds, and is refused."""
    if isinstance(a[0], ObjectValue):
        if a[0].depth < len(env.frames) - 1:
            raise CaptureError(f"a branch or loop on data sets an attribute of an object{where(node)}, which is not supported")
        a[0].attributes[node.s("name")] = a[1]
        return ()
    old = get_attribute(env, a[0], node.s("name"))
    new = a[1]
    while isinstance(new, fx.Node) and new is not old and new.op == "call_function" and written_nodes(new):
        new = new.args[0]
    if new is not old:
        raise CaptureError(f"forward assigns self.{node.s('name')}{where(node)}; write into a buffer in place instead (copy_)")
    return ()


@handles("prim::HasAttr")
def _unsupported(env: Environment, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"{node.kind()}{where(node)} is not supported")


def get_attribute(env: Environment, owner: ModuleValue, name: str) -> Any:
    value = getattr(owner.module, name)
    path = f"{owner.path}.{name}" if owner.path else name
    if isinstance(value, torch.jit.ScriptModule) or (wraps_script_object(value) and not isinstance(value, torch.Tensor)):
        return ModuleValue(value, path)
    return _known(env, value, env.without_prefix(path))


def _known(env: Environment, value: Any, path: str) -> Any:
    """A constant or attribute of the module: its tensors become constants, containers stay containers."""
    if isinstance(value, torch.Tensor):
        # A weight packed for oneDNN is opaque; unpacking it is exact.
        return env.draft.constant(path, value.to_dense() if value.is_mkldnn else value)
    if isinstance(value, (list, tuple)):
        parts = type(value)(_known(env, v, f"{path}.{i}") for i, v in enumerate(value))
        return _attribute(env, parts) if isinstance(parts, list) else parts
    if isinstance(value, dict):
        return _attribute(env, {k: _known(env, v, f"{path}.{k}") for k, v in value.items()})
    return NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


def _attribute(env: Environment, container: Any) -> Any:
    env.containers[id(container)] = Container(container, ATTRIBUTE, "")
    return container
