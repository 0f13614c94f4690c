"""Lists, tuples, dicts and strings: on Python values where they are known, else on nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.operators import call_operator, part_of
from ir_tools.frontends.torchscript.registry import HANDLERS, Handler, handles
from ir_tools.frontends.torchscript.values import holds
from ir_tools.ir import facts
from ir_tools.ir.host import TENSOR, pop_first_item, set_item, value_type


@handles("prim::ListConstruct")
def _list(env: Environment, node: Any, a: list[Any]) -> Any:
    return list(a)


@handles("prim::TupleConstruct")
def _tuple(env: Environment, node: Any, a: list[Any]) -> Any:
    return tuple(a)


@handles("prim::DictConstruct")
def _dict(env: Environment, node: Any, a: list[Any]) -> Any:
    return dict(zip(a[::2], a[1::2], strict=True))


@handles("aten::dict")
def _new_dict(env: Environment, node: Any, a: list[Any]) -> Any:
    return dict(a[0]) if a else {}


@handles("prim::ListUnpack", "prim::TupleUnpack")
def _unpack(env: Environment, node: Any, a: list[Any]) -> Any:
    parts = a[0]
    if isinstance(parts, fx.Node):
        parts = [part_of(env, parts, i, v.type().annotation_str) for i, v in enumerate(node.outputs())]
    return parts[0] if node.outputsSize() == 1 else parts


@handles("prim::TupleIndex")
def _tuple_index(env: Environment, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return part_of(env, a[0], a[1], next(iter(node.outputs())).type().annotation_str)
    return a[0][a[1]]


@handles("prim::TupleSlice")
def _tuple_slice(env: Environment, node: Any, a: list[Any]) -> Any:
    return a[0][node.i("beg") : node.i("end")]


@handles("aten::len")
def _length(env: Environment, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], (list, tuple, dict, str)):
        return len(a[0])
    return env.draft.size(a[0], 0) if value_type(a[0]) == TENSOR and facts.rank(a[0]) else NotImplemented


@handles("aten::slice")
def _slice(env: Environment, node: Any, a: list[Any]) -> Any:
    if not isinstance(a[0], (list, tuple, str)) or any(isinstance(v, fx.Node) for v in a[1:]):
        return NotImplemented
    return a[0][a[1] : a[2] : a[3]]


@handles("aten::extend", "aten::add_", "aten::update")
def _join_in_place(env: Environment, node: Any, a: list[Any]) -> Any:
    if not isinstance(a[0], (list, dict)):
        return NotImplemented
    env.changes(a[0])
    if isinstance(a[1], fx.Node):  # of unknown length
        return call_operator(env, node, [env.made_node(a[0]), a[1]])
    a[0].update(a[1]) if isinstance(a[0], dict) else a[0].extend(a[1])
    return a[0]


@handles("aten::add", "aten::eq", "aten::ne")
def _on_two(env: Environment, node: Any, a: list[Any]) -> Any:
    one, other = a[:2]
    containers = (list, tuple, dict, str)
    if not isinstance(one, containers) or not isinstance(other, containers):
        return NotImplemented
    if node.kind() == "aten::add":
        return operator.add(one, other)
    if holds(a, fx.Node):
        return NotImplemented
    return (one == other) is (node.kind() == "aten::eq")


def _on_container(function: Callable[..., Any], changes: bool = False) -> Handler:
    """A handler that acts when its first argument is a Python container or string and the others are known as well.

    Everything else is left to the operator. `changes`: the first argument is changed.
    """

    def handler(env: Environment, node: Any, a: list[Any]) -> Any:
        if not isinstance(a[0], (list, tuple, dict, str)):
            return NotImplemented
        if node.kind() in _BY_KEY and isinstance(a[1], fx.Node):
            return NotImplemented
        if node.kind() in _BY_VALUE and isinstance(a[0], list) and holds(a, fx.Node):
            return NotImplemented
        if changes:
            env.changes(a[0])
        return function(*a)

    return handler


_BY_KEY = frozenset(
    "aten::__getitem__ aten::_set_item aten::Delete aten::__contains__ aten::setdefault aten::mul aten::mul_".split()
)
"""With a runtime key or count, even a container that is known is read or changed at run time."""
_BY_VALUE = frozenset("aten::__contains__ aten::remove aten::sort".split())
"""So is a list with runtime values in it, where they are compared."""


def _delete(container: Any, key: Any) -> tuple:
    del container[key]
    return ()


def _in_place(method: str) -> Callable[..., Any]:
    def function(container: Any, *args: Any) -> Any:
        getattr(container, method)(*args)
        return container

    return function


HANDLERS.update({
    "aten::__getitem__": _on_container(lambda c, key: c[key]),
    "aten::_set_item": _on_container(set_item, changes=True),
    "aten::Delete": _on_container(_delete, changes=True),
    "aten::append": _on_container(_in_place("append"), changes=True),
    "aten::insert": _on_container(_in_place("insert"), changes=True),
    "aten::reverse": _on_container(_in_place("reverse"), changes=True),
    "aten::clear": _on_container(_in_place("clear"), changes=True),
    "aten::pop": _on_container(lambda c, *a: c.pop(*a), changes=True),
    "aten::remove": _on_container(_in_place("remove"), changes=True),
    "aten::sort": _on_container(lambda c, reverse=False: c.sort(reverse=reverse), changes=True),
    "aten::popitem": _on_container(pop_first_item, changes=True),
    "aten::setdefault": _on_container(lambda c, *a: c.setdefault(*a), changes=True),
    "aten::mul_": _on_container(operator.imul, changes=True),
    "aten::copy": _on_container(lambda c: c.copy()),
    "aten::list": _on_container(list),
    "aten::keys": _on_container(lambda c: list(c)),
    "aten::values": _on_container(lambda c: list(c.values())),
    "aten::items": _on_container(lambda c: list(c.items())),
    "aten::get": _on_container(lambda c, *a: c.get(*a)),
    "aten::__contains__": _on_container(lambda c, key: key in c),
    "aten::mul": _on_container(lambda x, n: x * n),
    "aten::join": _on_container(lambda text, parts: text.join(parts)),
})  # fmt: skip
