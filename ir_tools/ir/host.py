"""Ops on numbers, strings and containers: what TorchScript's interpreter does itself, on the host, without a kernel.

    make_list(a, b)                   [a, b]           aten::append.t(l, x)       l.append(x)
    make_tuple(a, b)                  (a, b)           aten::add.int(n, 1)        n + 1
    make_dict([k], [v])               {k: v}           aten::size.int(x, 0)       x.shape[0]
    fail(message)                     raise            aten::Bool.Tensor(x)       bool(x)

torch registers most of them as operators, which gives each one a schema (types, what it writes, what it may alias) and a
syntax in TorchScript; but an operator called from Python gets a copy of a list, and knows no symbolic sizes. `meaning`
is therefore a Python function for each. A value that is no tensor carries its TorchScript type (`value_type`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from ir_tools.torch_compat.operators import OpOverload, schema_of

TENSOR = "Tensor"


def make_list(*items: Any) -> list:
    return list(items)


def make_tuple(*items: Any) -> tuple:
    return tuple(items)


def make_dict(keys: list, values: list) -> dict:
    return dict(zip(keys, values, strict=True))


def fail(message: str) -> None:
    """Raise, as the model does on purpose."""
    raise RuntimeError(message)


CONSTRUCTORS = frozenset({make_list, make_tuple, make_dict})


def value_type(value: Any) -> str:
    """The TorchScript type of a node's value, "Tensor" unless it says otherwise: "int", "List[Tensor]", "Optional[Tensor]"."""
    known = value.meta.get("type")
    if known is None and value.op == "call_function" and isinstance(value.target, OpOverload) and is_host(value.target):
        return str(schema_of(value.target).returns[0].type.annotation_str) if schema_of(value.target).returns else "NoneType"
    return str(known or TENSOR)


def set_value_type(node: fx.Node, annotation: str) -> None:
    node.meta["type"] = annotation


def inner_types(annotation: str) -> list[str]:
    """`["str", "Tensor"]` of `Dict[str, Tensor]`, `["Tensor"]` of `List[Tensor]`."""
    inside, parts, depth = annotation[annotation.index("[") + 1 : -1], [""], 0
    for c in inside:
        depth += (c == "[") - (c == "]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts if part.strip()]


def is_container_type(annotation: str) -> bool:
    """Of a type whose values can be changed in place, or hold what can."""
    return annotation.startswith(("List[", "Dict[", "Tuple[", "Optional[List[", "Optional[Dict[", "Optional[Tuple["))


def is_host(target: Any) -> bool:
    """The target computes no tensor: it makes, reads or changes numbers, strings and containers."""
    return meaning(target) is not None


@lru_cache(maxsize=4096)
def meaning(target: Any) -> Callable[..., Any] | None:
    """What a host op does, as a Python function; None for any other target.

    Symbolic sizes (`torch.SymInt`) are understood wherever Python's own operators understand them.
    """
    if target in CONSTRUCTORS or target is fail:
        return target  # type: ignore[no-any-return]
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prim"):
        return None
    schema = schema_of(target)
    if any(TENSOR in str(r.type) for r in schema.returns):
        return None
    if any(TENSOR in str(a.type) for a in schema.arguments):
        return TENSOR_READS.get(schema.name)
    return MEANINGS.get(schema.name, target)


def _changes(method: str) -> Callable[..., Any]:
    """A method that changes its container, as an op that returns the container."""

    def change(container: Any, *arguments: Any) -> Any:
        getattr(container, method)(*arguments)
        return container

    return change


def set_item(container: Any, key: Any, value: Any) -> Any:
    """The container itself, changed."""
    container[key] = value
    return container


def _delete(container: Any, key: Any) -> None:
    del container[key]


def _add_in_place(container: list, other: list) -> list:
    container += other
    return container


def pop_first_item(container: dict) -> tuple:
    """TorchScript's `popitem`; Python's takes the last one."""
    key = next(iter(container))
    return key, container.pop(key)


def _multiply_in_place(container: list, times: int) -> list:
    container *= times
    return container


def _as_int(value: Any) -> Any:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return torch.sym_int(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else _unless_symbolic(int)(value)


def _as_float(value: Any) -> Any:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return torch.sym_float(value) if isinstance(value, (torch.SymInt, torch.SymFloat)) else _unless_symbolic(float)(value)


def _as_bool(value: Any) -> Any:
    value = value.item() if isinstance(value, torch.Tensor) else value
    if isinstance(value, torch.SymBool):
        return value
    return value != 0 if isinstance(value, (torch.SymInt, torch.SymFloat)) else bool(value)


def _unless_symbolic(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, raising `TypeError` for symbolic conditions: torch does not treat them as numbers, nor compare them."""

    def plain(*values: Any) -> Any:
        if any(isinstance(value, torch.SymBool) for value in values):
            raise TypeError("a symbolic condition is no number")
        return function(*values)

    return plain


def _not(value: Any) -> Any:
    return torch.sym_not(value) if isinstance(value, torch.SymBool) else not value


def _extreme(plain: Any, symbolic: Any, values: tuple) -> Any:
    if any(isinstance(v, (torch.SymInt, torch.SymFloat)) for v in values):
        return symbolic(*values)
    return float(plain(*values)) if any(isinstance(v, float) for v in values) else plain(*values)


def _range_length(low: Any, high: Any, step: Any) -> Any:
    if isinstance(step, int) and step == 1 and low == 0 and isinstance(high, torch.SymInt):
        return torch.sym_max(high, 0)
    return len(range(low, high, step))


# By the names of the operators: overloads without tensors. What is not here is called as it is; what changes a container
# must be here, since an operator called from Python changes a copy.
MEANINGS: dict[str, Callable[..., Any]] = {
    # containers and strings
    "aten::__getitem__": operator.getitem,
    "aten::_set_item": set_item,
    "aten::Delete": _delete,
    "aten::append": _changes("append"),
    "aten::extend": _changes("extend"),
    "aten::insert": _changes("insert"),
    "aten::reverse": _changes("reverse"),
    "aten::clear": _changes("clear"),
    "aten::update": _changes("update"),
    "aten::remove": _changes("remove"),
    "aten::sort": lambda container, reverse: container.sort(reverse=reverse),
    "aten::popitem": pop_first_item,
    "aten::setdefault": lambda container, *arguments: container.setdefault(*arguments),
    "aten::mul_": _multiply_in_place,
    "aten::pop": lambda container, *arguments: container.pop(*arguments),
    "aten::add_": _add_in_place,
    "aten::copy": lambda container: container.copy(),
    "aten::list": list,
    "aten::keys": list,
    "aten::values": lambda container: list(container.values()),
    "aten::items": lambda container: list(container.items()),
    "aten::get": lambda container, *arguments: container.get(*arguments),
    "aten::slice": lambda container, start, end, step: container[start:end:step],
    "aten::__contains__": lambda container, key: key in container,
    "aten::join": lambda text, parts: text.join(parts),
    "aten::len": len,
    "aten::_unwrap_optional": lambda value: value,
    "aten::__is__": operator.is_,
    "aten::__isnot__": operator.is_not,
    # numbers
    "aten::Int": _as_int,
    "aten::Float": _as_float,
    "aten::Bool": _as_bool,
    "aten::add": operator.add,
    "aten::sub": operator.sub,
    "aten::mul": operator.mul,
    "aten::div": operator.truediv,
    "aten::floordiv": operator.floordiv,
    "aten::remainder": operator.mod,
    "aten::neg": operator.neg,
    "aten::ceil": math.ceil,
    "aten::floor": math.floor,
    "aten::eq": _unless_symbolic(operator.eq),
    "aten::ne": _unless_symbolic(operator.ne),
    "aten::lt": operator.lt,
    "aten::le": operator.le,
    "aten::gt": operator.gt,
    "aten::ge": operator.ge,
    "aten::__not__": _not,
    "aten::__and__": operator.and_,
    "aten::__or__": operator.or_,
    "aten::__xor__": operator.xor,
    "aten::__range_length": _range_length,
    "aten::__derive_index": lambda index, start, step: start + index * step,
    "prim::max": lambda *values: _extreme(max, torch.sym_max, values),
    "prim::min": lambda *values: _extreme(min, torch.sym_min, values),
}

# By the names of the operators that read a tensor: its facts, or a number in it.
TENSOR_READS: dict[str, Callable[..., Any]] = {
    "aten::size": lambda tensor, dim=None: list(tensor.shape) if dim is None else tensor.shape[dim],
    "aten::dim": lambda tensor: tensor.dim(),
    "aten::numel": lambda tensor: tensor.numel(),
    "aten::len": lambda tensor: tensor.shape[0],
    "aten::is_floating_point": lambda tensor: tensor.is_floating_point(),
    "aten::is_complex": lambda tensor: tensor.is_complex(),
    "prim::device": lambda tensor: tensor.device,
    "aten::item": lambda tensor: tensor.item(),
    "aten::Int": _as_int,
    "aten::IntImplicit": _as_int,
    "aten::Float": _as_float,
    "aten::FloatImplicit": _as_float,
    "aten::Bool": _as_bool,
    "aten::ScalarImplicit": lambda tensor: tensor.item(),
}
