"""Effects: what a node writes, draws or raises, what its results may alias, and which nodes are live.

torch's schemas say it, but for two tables: composite ops whose schema hides an alias, and ops whose schema hides a write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ir_tools.ir.dialect import bound_arguments, getitem, nodes_in, op_name
from ir_tools.ir.host import CONSTRUCTORS, fail, is_host
from ir_tools.ir.regions import bodies, inputs_of, is_region, region_loop

_SAME_DTYPE = "a cast to the dtype that it has already gives the tensor itself"
_OFF = "outside training it gives the tensor itself"
_VIEWS = "its parts are views, which the schema says are to be taken for copies"

# tests/ir_tools/test_alias_table.py runs ATen's ops, compares storages, and keeps this list complete and free of the rest.
HIDDEN_ALIASES: dict[str, str] = {
    "aten::_cast_Byte": _SAME_DTYPE,
    "aten::_cast_Char": _SAME_DTYPE,
    "aten::_cast_Double": _SAME_DTYPE,
    "aten::_cast_Float": _SAME_DTYPE,
    "aten::_cast_Half": _SAME_DTYPE,
    "aten::_cast_Int": _SAME_DTYPE,
    "aten::_cast_Long": _SAME_DTYPE,
    "aten::_cast_Short": _SAME_DTYPE,
    "aten::_to_cpu": "tensors on the CPU are given back",
    "aten::_unsafe_view": _VIEWS,
    "aten::alpha_dropout": _OFF,
    "aten::atleast_1d": "a list of tensors: each of enough axes is given back, the others are viewed",
    "aten::atleast_2d": "a list of tensors: each of enough axes is given back, the others are viewed",
    "aten::atleast_3d": "a list of tensors: each of enough axes is given back, the others are viewed",
    "aten::broadcast_tensors": "each tensor is expanded",
    "aten::cartesian_prod": "one tensor alone is given back",
    "aten::conj_physical": "a real tensor is its own conjugate",
    "aten::data": "the tensor itself, without its history",
    "aten::dequantize": "a float tensor needs no dequantising",
    "aten::dropout": _OFF,
    "aten::einsum": "an equation that only permutes axes, or takes a diagonal, gives a view",
    "aten::feature_alpha_dropout": _OFF,
    "aten::feature_dropout": _OFF,
    "aten::flatten_dense_tensors": "one tensor alone is viewed flat",
    "aten::histogramdd": "the bins that were given are given back",
    "aten::lift": "outside functorch it gives the tensor itself",
    "aten::meshgrid": "each tensor is expanded",
    "aten::set": "the result has the memory of the second argument",
    "aten::sum_to_size": "nothing is summed when the size is the tensor's own",
    "aten::to_dense": "a dense tensor is given back",
    "aten::to_sparse": "a sparse tensor of that layout is given back",
    "aten::type_as": _SAME_DTYPE,
    "aten::unflatten_dense_tensors": "the parts are views of the flat tensor",
    "aten::unsafe_chunk": _VIEWS,
    "aten::unsafe_split": _VIEWS,
    "aten::unsafe_split_with_sizes": _VIEWS,
}
"""Ops whose schema says "fresh tensor" although the result may be, or view, an argument; and when that is so.

The schema's own alias annotations cover all other ops.
"""

# Ops that write into arguments although their schema does not say so: the switch, and what is written when it is on.
HIDDEN_WRITES = {
    "aten::batch_norm": ("training", ("running_mean", "running_var")),
    "aten::native_batch_norm": ("training", ("running_mean", "running_var")),
    "aten::instance_norm": ("use_input_stats", ("running_mean", "running_var")),
}

_SEEDED = frozenset("aten::dropout aten::feature_dropout aten::alpha_dropout aten::feature_alpha_dropout".split())
_SIDE_EFFECTS = frozenset("aten::_assert_async aten::_assert_scalar aten::_functional_assert_async".split())


@lru_cache(maxsize=4096)
def written_arguments(target: Any) -> tuple[str, ...]:
    """Names of the tensors, or lists of them, that the op writes into (none for a pure op)."""
    return () if is_host(target) else _marked_as_written(target)


def _marked_as_written(target: Any) -> tuple[str, ...]:
    if not isinstance(target, OpOverload):
        return ()
    return tuple(a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


@lru_cache(maxsize=4096)
def aliased_arguments(target: Any) -> tuple[str, ...]:
    """Names of the arguments whose storage a result may share: by schema, or by the table of hidden aliases."""
    if target is getitem:
        return ("container",)
    if not isinstance(target, OpOverload):
        return ()
    if is_host(target):
        # A container holds what was put into it; a number or a string holds nothing.
        plain = target._schema.returns and str(target._schema.returns[0].type) in PLAIN_TYPES
        return () if plain else tuple(a.name for a in target._schema.arguments)
    hidden = op_name(target) in HIDDEN_ALIASES
    returns_alias = any(r.alias_info is not None for r in target._schema.returns)
    names = []
    for a in target._schema.arguments:
        tensor_like = "Tensor" in str(a.type)
        if tensor_like and (hidden or (returns_alias and a.alias_info is not None)):
            names.append(a.name)
    return tuple(names)


PLAIN_TYPES = frozenset("int float bool str number complex Device List[int] List[float] List[bool] List[str]".split())
"""Types of values that hold no tensor."""


def written_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors `node` writes into."""
    if node.op != "call_function":
        return []
    if is_region(node):
        return _inputs(node, lambda effects: effects.written)
    names = written_arguments(node.target)
    switch, hidden = HIDDEN_WRITES.get(op_name(node.target), ("", ()))
    if not names and not hidden:
        return []
    given = bound_arguments(node)
    if hidden and given[switch] is not False:
        names += hidden
    return [n for name in names for n in nodes_in(given.get(name))]


def aliased_nodes(node: fx.Node) -> list[fx.Node]:
    """The arguments of `node` whose storage its result may share."""
    if node.op != "call_function":
        return []
    if is_region(node):
        # A loop of no rounds gives back what it was to carry.
        carried = nodes_in(node.args[3]) if node.target is region_loop else ()
        return [*_inputs(node, lambda effects: effects.escaping), *carried]
    if node.target in CONSTRUCTORS:
        return list(nodes_in(node.args))
    given = bound_arguments(node)
    return [n for name in aliased_arguments(node.target) for n in nodes_in(given.get(name))]


def changed_containers(node: fx.Node) -> list[fx.Node]:
    """The lists and dicts that `node` changes: not the tensors in them, but which ones they are."""
    if node.op != "call_function":
        return []
    if is_region(node):
        return _inputs(node, lambda effects: effects.changed)
    if not isinstance(node.target, OpOverload) or not is_host(node.target):
        return []
    names = _marked_as_written(node.target)
    given = bound_arguments(node) if names else {}
    return [n for name in names for n in nodes_in(given.get(name))]


def _inputs(node: fx.Node, which: Callable[[Any], frozenset[int]]) -> list[fx.Node]:
    """The nodes given to those placeholders of a region's bodies that `which(effects)` numbers."""
    given = inputs_of(node)
    return [n for body in bodies(node) for i in sorted(which(body.effects)) for n in nodes_in(given[i])]


def is_random(node: fx.Node) -> bool:
    """The op draws from a random generator (a dropout only when it is switched on)."""
    if is_region(node):
        return any(body.effects.random for body in bodies(node))
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    if op_name(node.target) not in _SEEDED and torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    given = bound_arguments(node)
    off = (given.get("train"), given.get("training"), given.get("p", given.get("dropout_p", given.get("dropout"))))
    return not any(switch is False or (isinstance(switch, float) and switch == 0) for switch in off)


def has_effect(node: fx.Node) -> bool:
    """Dropping the node could be noticed: it writes, may raise on purpose, draws random numbers, or may never end."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    return bool(written_nodes(node)) or bool(changed_containers(node)) or acts(node)


def acts(node: fx.Node) -> bool:
    """The node does something other than computing its result and writing into its operands."""
    if is_region(node):
        return node.target is region_loop or any(body.effects.acts for body in bodies(node))
    return node.target is fail or op_name(node.target) in _SIDE_EFFECTS or is_random(node)


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs, or an effect, need."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in live or has_effect(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live
