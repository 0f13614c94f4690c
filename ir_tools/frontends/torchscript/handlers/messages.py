"""Strings made of values, what is raised, and what is printed."""

from __future__ import annotations

from typing import Any

from torch import fx

from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import where
from ir_tools.frontends.torchscript.registry import handles
from ir_tools.frontends.torchscript.values import Raised, TextOfData


@handles("aten::str")
def _text(env: Environment, node: Any, a: list[Any]) -> Any:
    return TextOfData("<value>") if isinstance(a[0], fx.Node) else str(a[0])


@handles("aten::format")
def _format(env: Environment, node: Any, a: list[Any]) -> Any:
    if any(isinstance(v, (fx.Node, TextOfData)) for v in a):
        return TextOfData(a[0].format(*("<value>" if isinstance(v, fx.Node) else v for v in a[1:])))
    return a[0].format(*a[1:])


@handles("prim::RaiseException")
def _raise(env: Environment, node: Any, a: list[Any]) -> Any:
    raise Raised(str(a[0]) if isinstance(a[0], str) and a[0] else f"an assertion of the model failed{where(node)}")


@handles("prim::Print", "aten::warn")
def _nothing(env: Environment, node: Any, a: list[Any]) -> Any:
    return ()
