"""Optional values and other types: None or not, `isinstance`, and casts that say what is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import where
from ir_tools.frontends.torchscript.registry import handles
from ir_tools.frontends.torchscript.values import UNINITIALIZED
from ir_tools.ir.host import set_value_type, value_type

aten = torch.ops.aten


@handles("prim::Uninitialized")
def _uninitialized(env: Environment, node: Any, a: list[Any]) -> Any:
    return UNINITIALIZED


@handles("prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::_unwrap_optional")
def _unwrap(env: Environment, node: Any, a: list[Any]) -> Any:
    """A value that is known not to be None here."""
    if not isinstance(a[0], fx.Node) or not value_type(a[0]).startswith("Optional["):
        return a[0]
    wanted = next(iter(node.outputs())).type().annotation_str
    if value_type(a[0]) != f"Optional[{wanted}]":
        raise CaptureError(f"a {value_type(a[0])} is taken for a {wanted}{where(node)}, which is not supported")
    new = env.draft.call(aten._unwrap_optional.default, a[0])
    set_value_type(new, wanted)
    return new


@handles("prim::rangelist_identity")
def _same_value(env: Environment, node: Any, a: list[Any]) -> Any:
    return a[0]


@handles("aten::__is__", "aten::__isnot__")
def _is(env: Environment, node: Any, a: list[Any]) -> Any:
    nodes = [v for v in a if isinstance(v, fx.Node)]
    if any(v is None for v in a) and any(value_type(v).startswith("Optional[") for v in nodes):
        return NotImplemented
    same = a[0] is a[1]
    return same if node.kind() == "aten::__is__" else not same


@handles("prim::isinstance")
def _is_instance(env: Environment, node: Any, a: list[Any]) -> Any:
    """Decided by what the value is; one that may be None at run time is not decided here."""
    wanted = [t.annotation_str for t in node.tys("types")]
    value = a[0]
    given = value_type(value) if isinstance(value, fx.Node) else type(value).__name__
    if given in wanted or (value is None and "None" in " ".join(wanted)):
        return True
    if isinstance(value, fx.Node) and given.startswith(("Optional[", "Union[", "Any")):
        raise CaptureError(f"isinstance of a value that may be of several types{where(node)} is not supported")
    if isinstance(value, (list, tuple, dict)):
        raise CaptureError(f"isinstance of a {given}{where(node)} is not supported")
    return False
