"""A Program as text, one line per node:

    conv2d_1 = conv2d(input=relu, weight=layer1.0.conv1.weight, padding=[1, 1]) : f32[1,64,56,56]  # layer1.0.conv1

Arguments that have their schema's default are left out; constants go by the name of the user's parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ir_tools.ir.dialect import argument_names, bound_arguments, short_name
from ir_tools.ir.facts import fact
from ir_tools.ir.origin import origin
from ir_tools.ir.program import Program

_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`; the long name where there is no short one."""
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def describe_value(value: Any) -> str:
    """`f32[1,64,56,56]` for a tensor, `(f32[1], i64[1])` for several, `?` for an unknown one."""
    if isinstance(value, torch.Tensor):
        return f"{short_dtype(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(describe_value, value))})"
    return "?" if value is None else type(value).__name__


@lru_cache(maxsize=4096)
def _defaults(target: OpOverload) -> dict[str, Any]:
    return {a.name: a.default_value for a in target._schema.arguments if a.has_default_value()}


def stated_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call, by schema name, that differ from their defaults."""
    if not isinstance(node.target, OpOverload):
        # Dumps are also drawn of graphs that a user's pass broke, so nothing is assumed about other targets.
        return bound_arguments(node) if len(node.args) == 2 else {str(i): a for i, a in enumerate(node.args)}
    if len(node.args) > len(argument_names(node.target)[0]):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    defaults = _defaults(node.target)
    return {k: v for k, v in bound_arguments(node).items() if k not in defaults or not _same(v, defaults[k])}


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    # `True == 1` and `1 == 1.0`, but the schema tells them apart.
    return type(value) is type(default) and value == default


def argument_text(value: Any) -> str:
    """An argument as it is written in a listing: nodes and constants by name, everything else as Python."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(argument_text, value))}]"
    return repr(value)


def node_text(node: fx.Node) -> str:
    """One node without its name, fact and module: `conv2d(input=x, weight=conv1.weight)`."""
    if node.op == "output":
        return ", ".join(map(argument_text, node.args[0]))  # type: ignore[union-attr, arg-type]
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    arguments = ", ".join(f"{k}={argument_text(v)}" for k, v in stated_arguments(node).items())
    return f"{short_name(node.target)}({arguments})"


def _lines(program: Program) -> Iterator[str]:
    yield f"# {len(program)} ops, {len(program.used_constants())} constants" + (
        f", captured by {program.frontend}" if program.frontend else ""
    )
    for node in program.graph.nodes:
        if node.op == "placeholder":
            yield f"input {node.name} : {describe_value(fact(node))}"
        elif node.op == "get_attr":
            name = str(node.target)
            packed = "  # packed for oneDNN where it runs" if name in program.packings else ""
            state = "  # state" if name in program.state else ""
            yield f"constant {name} : {describe_value(program.constants.get(name))}{packed}{state}"
        elif node.op == "output":
            yield f"return {node_text(node)}"
        else:
            module = f"  # {origin(node).module}" if origin(node).module else ""
            yield f"{node.name} = {node_text(node)} : {describe_value(fact(node))}{module}"


def to_text(program: Program) -> str:
    """A readable listing of `program`: inputs and constants, one line per op in order of execution, outputs."""
    return "\n".join(_lines(program)) + "\n"
