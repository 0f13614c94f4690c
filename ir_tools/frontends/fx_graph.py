"""Copy an ATen-level fx graph (of torch.export or make_fx) into a draft, op by op through the normalizer."""

from __future__ import annotations

import math
import operator
import re
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.normalizer import Normalizer
from ir_tools.ir import Draft, Record, facts
from ir_tools.ir.dialect import map_argument
from ir_tools.ir.facts import ScalarFact
from ir_tools.ir.host import value_type
from ir_tools.torch_compat.operators import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    schema_of,
    set_grad_enabled,
    symbolic_sqrt,
)

aten = torch.ops.aten
# The functions that torch.export computes sizes with: Python's operators, and torch's for symbols.
NUMBER_OPS: dict[Any, OpOverloadPacket] = {
    operator.add: aten.add,
    operator.sub: aten.sub,
    operator.mul: aten.mul,
    operator.floordiv: aten.floordiv,
    operator.truediv: aten.div,
    operator.mod: aten.remainder,
    operator.neg: aten.neg,
    operator.pow: aten.pow,
    symbolic_sqrt: aten.sqrt,
    operator.eq: aten.eq,
    operator.ne: aten.ne,
    operator.lt: aten.lt,
    operator.le: aten.le,
    operator.gt: aten.gt,
    operator.ge: aten.ge,
    operator.and_: getattr(aten, "__and__"),  # noqa: B009  # Python would mangle it in a class; here it reads like the next
    operator.or_: getattr(aten, "__or__"),  # noqa: B009
    math.trunc: aten.Int,
    math.floor: aten.floor,
    math.ceil: aten.ceil,
    torch.sym_int: aten.Int,
    torch.sym_float: aten.Float,
    torch.sym_not: getattr(aten, "__not__"),  # noqa: B009
    torch.sym_max: torch.ops.prim.max,
    torch.sym_min: torch.ops.prim.min,
}


def number_op(draft: Draft, packet: OpOverloadPacket, args: list[Any]) -> Any:
    """An op on runtime numbers; the number itself where it is the same in every run."""
    kinds = [value_type(a) if isinstance(a, fx.Node) else type(a).__name__ for a in args]
    names = [kinds[0], "_".join(kinds), "default"]
    if packet is aten.pow and kinds == ["int", "int"]:
        names = ["int_to_int"]  # `pow.int` gives a float
    for name in names:
        overload = getattr(packet, name, None) if name in packet.overloads() else None
        declared = [str(a.type) for a in schema_of(overload).arguments] if overload is not None else []
        if declared[: len(kinds)] == kinds:
            node = draft.call(overload, *args)
            known = facts.fact(node)
            return known.value if isinstance(known, ScalarFact) and known.is_known and known.value is not None else node
    raise CaptureError(f"{packet} of {', '.join(kinds)} is not supported")


def _number_in(dtype: torch.dtype | None) -> OpOverloadPacket:
    """The op that reads the number in a tensor. `item` gives a number of unknown type, which no arithmetic op takes."""
    assert dtype is not None
    if dtype.is_complex:
        raise CaptureError("a complex runtime number is not supported")
    if dtype is torch.bool:
        return aten.Bool
    return aten.Float if dtype.is_floating_point else aten.Int


def _of_numbers(target: OpOverload, args: list[Any]) -> OpOverload:
    """`div.Scalar` for `div.Tensor` by a runtime number: torch.export writes both alike, TorchScript does not."""
    overload = schema_of(target).overload_name
    takes_number = any(
        str(declared.type) == "Tensor" and isinstance(a, fx.Node) and value_type(a) in ("int", "float", "bool")
        for declared, a in zip(schema_of(target).arguments, args, strict=False)
    )
    if not takes_number:
        return target
    wanted = overload.replace("Tensor", "Scalar")
    if "Tensor" not in overload or wanted not in target.overloadpacket.overloads():
        raise CaptureError(f"{target} is given a runtime number where it declares a tensor, which is not supported")
    return getattr(target.overloadpacket, wanted)  # type: ignore[no-any-return]


_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def copy_graph(
    normalizer: Normalizer,
    module: fx.GraphModule,
    values: dict[fx.Node, Any],
    prefix: str = "",
    keep_float: bool = False,
) -> list[Any]:
    """Copy every op; `values` holds what placeholders (and `get_attr` nodes) stand for. Returns the flat outputs.

    `prefix` is cut from module paths; `keep_float` marks what stands where the model switched autocast off.
    Raises `CaptureError` naming the source line of an op that cannot be copied.
    """

    def look_up(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    for node in module.graph.nodes:
        if node.op == "placeholder" or node in values:
            continue
        if node.op == "output":
            results = map_argument(node.args[0], look_up)
            return list(results) if isinstance(results, (list, tuple)) else [results]
        if node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
            continue
        if node.op != "call_function":
            raise CaptureError(f"{node.op} of {node.target} is not an ATen operator{_where(node)}")
        origin = Record(_module_path(node, prefix), source_line(node.meta.get("stack_trace") or ""), keep_float=keep_float)
        with normalizer.draft.origin(origin):
            values[node] = _copy_call(normalizer, node, look_up, prefix, keep_float)
    raise CaptureError("the graph has no output")


def _copy_call(normalizer: Normalizer, node: fx.Node, look_up: Any, prefix: str, keep_float: bool) -> Any:
    target = node.target
    args = [map_argument(a, look_up) for a in node.args]
    kwargs = {k: map_argument(v, look_up) for k, v in node.kwargs.items()}
    if isinstance(target, HigherOrderOperator):
        return _inline(normalizer, node, args, prefix, keep_float)
    if target is operator.getitem:
        container = args[0]
        return container[args[1]] if isinstance(container, (list, tuple)) else normalizer.call(target, *args)
    if target is aten.sym_size.int and isinstance(args[0], fx.Node):
        return normalizer.draft.size(*args)
    if target is aten.item.default and isinstance(args[0], fx.Node) and facts.dtype(args[0]) is not None:
        return number_op(normalizer.draft, _number_in(facts.dtype(args[0])), args)
    if target is aten.sym_numel.default and isinstance(args[0], fx.Node):
        return normalizer.draft.call(aten.numel.default, *args)
    if isinstance(target, OpOverload):
        if target is aten._assert_scalar.default and not isinstance(args[0], fx.Node) and not args[0]:
            raise CaptureError(f"an assertion of the model never holds: {args[1]}{_where(node)}")
        try:
            return normalizer.call(_of_numbers(target, args), *args, **kwargs)
        except TypeError as error:
            raise CaptureError(f"{error}{_where(node)}") from error
    if target in (set_grad_enabled,):
        return None
    if target in NUMBER_OPS and any(isinstance(a, fx.Node) for a in args):
        return number_op(normalizer.draft, NUMBER_OPS[target], args)
    if not any(isinstance(a, fx.Node) for a in args):
        return target(*args, **kwargs)  # type: ignore[operator]  # arithmetic on known numbers
    raise CaptureError(f"{target} is not an ATen operator{_where(node)}")


def _inline(normalizer: Normalizer, node: fx.Node, args: list[Any], prefix: str, keep_float: bool) -> Any:
    name = str(node.target)
    if name not in _INLINED:
        raise CaptureError(f"control flow by {name} is not supported yet{_where(node)}")
    if name == "wrap_with_autocast" and args[2]:
        raise CaptureError(f"the model switches autocast on inside forward, which is not supported{_where(node)}")
    at = next(i for i, a in enumerate(args) if isinstance(a, fx.GraphModule))
    body, operands = args[at], args[at + 1 :]
    inner = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    return copy_graph(normalizer, body, inner, prefix, keep_float or name == "wrap_with_autocast")


def _attribute(module: fx.GraphModule, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _module_path(node: fx.Node, prefix: str) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['self'\]\.?", "", path)
    return path.removeprefix(prefix) if path != prefix.rstrip(".") else ""


def source_line(trace: str) -> str:
    """ "file.py:12" of the innermost frame that is not torch's own, else of the innermost frame."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', trace) or re.findall(r"^\s*(\S[^\n(]*)\((\d+)\):", trace, re.M)
    innermost_first = frames[::-1] if 'File "' in trace else frames
    for file, line in innermost_first:
        if "/torch/" not in file.replace("\\", "/"):
            return f"{file.rsplit('/', 1)[-1]}:{line}"
    return f"{innermost_first[0][0].rsplit('/', 1)[-1]}:{innermost_first[0][1]}" if frames else ""


def _where(node: fx.Node) -> str:
    line = source_line(node.meta.get("stack_trace") or "")
    return f" (at {line})" if line else ""
