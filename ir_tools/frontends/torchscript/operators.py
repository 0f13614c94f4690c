"""A node without a handler: the operator of its schema is computed now, or becomes an op of the Program."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.torchscript.environment import Environment
from ir_tools.frontends.torchscript.nodes import overload_of, where
from ir_tools.frontends.torchscript.values import NUMBER_OF_DTYPE, holds, is_small
from ir_tools.ir import facts
from ir_tools.ir.dialect import canonicalize_arguments, getitem
from ir_tools.ir.effects import written_arguments
from ir_tools.ir.facts import UNKNOWN, ScalarFact, TupleFact
from ir_tools.ir.host import is_host, set_value_type
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.operators import OpOverload, schema_of


def call_operator(env: Environment, node: Any, arguments: list[Any]) -> Any:
    """The result of a node that is the operator of its schema: computed now when all is known, else an op."""
    overload = overload_of(node.schema(), node.kind(), where(node))
    at_runtime = holds(arguments, fx.Node)
    if at_runtime and is_host(overload):
        return _host_op(env, node, overload, arguments)
    arguments = env.all_here(arguments)
    names = [(a.name, a.kwarg_only) for a in schema_of(overload).arguments]
    positional = [v for v, (_, keyword) in zip(arguments, names, strict=True) if not keyword]
    keywords = {name: v for v, (name, keyword) in zip(arguments, names, strict=True) if keyword}
    for written in written_arguments(overload):
        _refuse_lost_write(env, arguments[[name for name, _ in names].index(written)], node)
    if at_runtime or _makes_a_tensor(overload):
        draws = torch.Tag.nondeterministic_seeded in overload.tags
        if not at_runtime and not draws and holds(arguments, torch.Tensor) and is_small(arguments):
            return _compute(env, overload, positional, keywords)
        env.entered |= {storage_of(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
        return _results(env, overload, env.normalizer.call(overload, *positional, **keywords))
    return _compute(env, overload, positional, keywords)


def _refuse_lost_write(env: Environment, value: Any, node: Any) -> None:
    """Refuse a write into a tensor made of numbers, known now, unless capture can do it once and for all."""
    if not isinstance(value, torch.Tensor):
        return
    # Tracing has written into the graph's own already, so that the value held is no longer the one to start from. What a
    # branch or loop on data writes is not known now, and what has become a constant may not change.
    if storage_of(value) in env.literals or storage_of(value) in env.entered or len(env.frames) > 1:
        raise CaptureError(f"the model writes into a tensor that is no buffer{where(node)}; make it a buffer")


def _compute(env: Environment, overload: OpOverload, positional: list[Any], keywords: dict[str, Any]) -> Any:
    """Run an operator now: all its arguments are known."""
    if overload.namespace == "aten":
        args, keywords = canonicalize_arguments(overload, tuple(positional), keywords)
        positional = list(args)
    result = overload(*positional, **keywords)
    return NUMBER_OF_DTYPE[result] if isinstance(result, torch.dtype) else result


def _host_op(env: Environment, node: Any, overload: OpOverload, arguments: list[Any]) -> Any:
    """An op on runtime numbers or containers; a number that is the same in every run is given as such."""
    if len(schema_of(overload).returns) > 1:
        raise CaptureError(f"{node.kind()} of a runtime number{where(node)} is not supported")
    types = [v.type().annotation_str for v in node.inputs()]
    given = [env.as_argument(a, t) for a, t in zip(arguments, types, strict=True)]
    new = env.draft.call(overload, *given)
    outputs = list(node.outputs())
    if not outputs or not schema_of(overload).returns:
        return given[0] if outputs else ()
    set_value_type(new, outputs[0].type().annotation_str)
    known = facts.fact(new)
    if isinstance(known, ScalarFact) and known.is_known and known.value is not None:
        return known.value
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema_of(overload).arguments[:1]) and (
        schema_of(overload).name in ("aten::append", "aten::add_", "aten::_set_item")
    ):
        return given[0]
    return new


def _results(env: Environment, overload: OpOverload, value: Any) -> Any:
    """A node with several results as a Python list of them."""
    known = facts.fact(value) if isinstance(value, fx.Node) else UNKNOWN
    returns = [r.type.annotation_str for r in schema_of(overload).returns]
    if isinstance(value, fx.Node) and known is UNKNOWN and len(returns) > 1:
        return tuple(part_of(env, value, i, annotation) for i, annotation in enumerate(returns))
    if isinstance(known, TupleFact):
        parts = [env.draft.call(getitem, value, i) for i in range(len(known))]
        return parts if len(returns) == 1 else tuple(parts)
    if isinstance(value, fx.Node) and known is UNKNOWN and len(returns) == 1:
        set_value_type(value, returns[0])
    return value


def part_of(env: Environment, container: fx.Node, index: int, annotation: str) -> fx.Node:
    """A part of a runtime tuple or list."""
    part = env.draft.call(getitem, container, index)
    set_value_type(part, annotation)
    return part


def _makes_a_tensor(overload: OpOverload) -> bool:
    return any("Tensor" in str(r.type) for r in schema_of(overload).returns)


def storage_of(value: torch.Tensor) -> int:
    """Where its memory starts: the same for every view of it."""
    return value.untyped_storage().data_ptr()
