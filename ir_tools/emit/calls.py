"""Calls of ops as text: every argument is written, so that TorchScript resolves the Program's overload and no other."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import fx

from ir_tools.emit.literals import literal, string_literal
from ir_tools.emit.runtime_checks import CHECK_HOLDS
from ir_tools.errors import EmitError
from ir_tools.ir.dialect import argument_names
from ir_tools.ir.facts import TensorFact, dtype
from ir_tools.ir.program import Program
from ir_tools.ir.shape_inference import FactError, compute_fact
from ir_tools.torch_compat.operators import OpOverload, schema_of

ASSERTIONS = frozenset({torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg})
_UNNAMED_ASSERTION = "an assertion of the model failed"


class Texts(Protocol):
    """What the values of a Program are called in the text."""

    @property
    def program(self) -> Program: ...

    def read(self, node: fx.Node) -> str: ...

    def held_float(self, value: float) -> str: ...


def call_text(node: fx.Node, target: OpOverload, variables: Texts) -> str:
    """A call of an op, its arguments as its schema declares them."""
    positional, keyword_only = argument_names(target)
    if len(node.args) != len(positional) or set(node.kwargs) != set(keyword_only):
        raise EmitError("the call leaves arguments out")
    kwargs = _with_bool_dtype(variables.program, node, target)
    declared = {a.name: a for a in schema_of(target).arguments}
    arguments = []
    for position, (name, value) in enumerate(zip(positional, node.args, strict=True)):
        if value is None and _is_ambiguous_none(target, position):
            arguments.append(f"torch.jit.annotate({declared[name].type.annotation_str}, None)")
        else:
            arguments.append(literal(value, declared[name].type, variables.read, variables.held_float))
    for name in keyword_only:
        arguments.append(f"{name}={literal(kwargs[name], declared[name].type, variables.read, variables.held_float)}")
    namespace, packet = schema_of(target).name.split("::")
    return f"torch.ops.{namespace}.{packet}({', '.join(arguments)})"


def assertion_text(node: fx.Node, variables: Texts) -> str:
    """A call of our own method in place of an assertion of the model."""
    holds, message = (*node.args, _UNNAMED_ASSERTION)[:2]
    if not isinstance(holds, fx.Node) or not isinstance(message, str):
        raise EmitError(f"takes a tensor and a message, got {node.args}")
    return f"{CHECK_HOLDS}({variables.read(holds)}, {string_literal(message)})"


@lru_cache(maxsize=4096)
def _is_ambiguous_none(target: OpOverload, position: int) -> bool:
    """Another overload declares another optional type at this position, so that a bare None could mean that one."""
    packet = target.overloadpacket
    own = schema_of(target).arguments[position].type.annotation_str
    for overload in packet.overloads():
        arguments = schema_of(getattr(packet, overload)).arguments
        if position < len(arguments):
            other = arguments[position].type
            if other.kind() == "OptionalType" and other.annotation_str != own:
                return True
    return False


def _with_bool_dtype(program: Program, node: fx.Node, target: OpOverload) -> dict[str, Any]:
    """The keyword arguments, with the dtype filled in where a bool number would otherwise decide it.

    TorchScript has no bool numbers: `full([2], True)` is read as `full([2], 1)` and gives integers.
    Raises EmitError where that cannot be said with a dtype.
    """
    kwargs = dict(node.kwargs)
    declared = {a.name: a.type for a in schema_of(target).arguments}
    given = dict(zip(argument_names(target)[0], node.args, strict=True)) | kwargs
    if not any(isinstance(v, bool) and "number" in declared[k].annotation_str for k, v in given.items()):
        return kwargs
    wanted = dtype(node)

    def as_number(name: str, value: Any) -> Any:
        return int(value) if isinstance(value, bool) and "number" in declared[name].annotation_str else value

    args = tuple(as_number(k, given[k]) for k in argument_names(target)[0])
    try:
        read = compute_fact(program.mode, target, args, {k: as_number(k, v) for k, v in kwargs.items()})
    except FactError as error:
        raise EmitError(f"a bool given as a number is an int in TorchScript: {error}") from None
    if wanted is None or not isinstance(read, TensorFact) or read.dtype == wanted:
        return kwargs
    if "dtype" in kwargs and kwargs["dtype"] is None:
        return kwargs | {"dtype": wanted}
    raise EmitError(f"a bool given as a number is an int in TorchScript and makes the result {read.dtype}, not {wanted}")
