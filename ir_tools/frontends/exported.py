"""ExportedPrograms that the user gives: how they are called, which of their sizes are dynamic, what they refuse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError, DynamicShapesError
from ir_tools.frontends.exported_sizes import exported_inputs, exported_range, exported_sizes
from ir_tools.ir.dialect import overload_name
from ir_tools.ir.signature import DynamicSize
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.export import call_spec_of
from ir_tools.torch_compat.operators import OpOverload, schema_of

Exported = torch.export.ExportedProgram


# -- calls --------------------------------------------------------------------------------------------------------------


def exported_parameters(module: fx.GraphModule) -> list[inspect.Parameter]:
    """The parameters of `ExportedProgram.module()`: what torch.export was given by keyword is taken by keyword only."""
    args, kwargs = call_spec_of(module).children()
    names = list(inspect.signature(module.forward).parameters)[: args.num_children]
    positional = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    return [*positional, *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in kwargs.context)]


def is_exported_module(model: Any) -> bool:
    return isinstance(model, fx.GraphModule) and isinstance(call_spec_of(model), pytree.TreeSpec)


def in_exported_order(exported: Exported, arguments: dict[str, Any]) -> dict[str, Any]:
    """Bound arguments with the keys of their dicts in the order of the program's inputs.

    A call of another structure stays as it is: the program refuses it itself, with a reason, when it runs.
    """
    spec: pytree.TreeSpec = exported.call_spec.in_spec  # type: ignore[assignment]
    args, kwargs = spec.children()
    names = list(arguments)[: args.num_children]
    try:
        leaves = spec.flatten_up_to((tuple(arguments[n] for n in names), {n: arguments[n] for n in kwargs.context}))
    except (ValueError, KeyError):
        return arguments
    positional, by_keyword = pytree.tree_unflatten(leaves, spec)
    return dict(zip(names, positional, strict=True)) | by_keyword


# -- sizes --------------------------------------------------------------------------------------------------------------


def sizes_of_exported(exported: Exported, dynamic_shapes: Any) -> list[dict[int, DynamicSize]]:
    """Per tensor input: its dynamic axes, called as torch.export calls them; equal expressions are one size.

    Raises `DynamicShapesError` when `dynamic_shapes` is given as well.
    """
    if dynamic_shapes is not None:
        raise DynamicShapesError(
            "the sizes of an ExportedProgram were settled when it was exported: leave dynamic_shapes out, "
            "or give the module that it was exported from"
        )
    names: dict[str, str] = {}

    def dynamic(size: torch.SymInt) -> DynamicSize:
        expression = str(size.node.expr)
        if expression not in names:
            plain = expression if expression.isidentifier() else "size_" + re.sub(r"\W+", "_", expression)
            names[expression] = plain if plain not in names.values() else f"{plain}_{len(names)}"
        return DynamicSize(names[expression], *exported_range(exported, size))

    return [
        {axis: dynamic(size) for axis, size in enumerate(sizes) if not isinstance(size, int)}
        for sizes in exported_sizes(exported)
    ]


def sources_in_guards(exported: Exported, names: Sequence[str]) -> list[list[str]]:
    """What the guards of the program may call each tensor input: `L['x']['key']`, in strict mode `L['flat_args'][0]`.

    `names`: those of the parameters that go by position.
    """
    spec: pytree.TreeSpec = exported.call_spec.in_spec  # type: ignore[assignment]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))
    found = []
    for number, ((path, _), value) in enumerate(zip(paths, exported_inputs(exported), strict=True)):
        if isinstance(value, torch.Tensor):
            name = names[path[1].idx] if isinstance(path[1], pytree.SequenceKey) else path[1].key  # type: ignore[attr-defined]
            found.append([f"{first}{pytree.keystr(path[2:])}" for first in _sources(name)] + [f"L['flat_args'][{number}]"])
    return found


def _sources(name: str) -> list[str]:
    """`xs_0` of the program's signature may be the first of `*xs`."""
    numbered = re.fullmatch(r"(\w+)_(\d+)", name)
    return [f"L['{name}']"] + ([f"L['{numbered[1]}'][{numbered[2]}]"] if numbered else [])


# -- training -----------------------------------------------------------------------------------------------------------


def refuse_training(exported: Exported) -> None:
    """Raise `CaptureError` for a program that was exported from a model in training mode, naming an op that shows it."""
    for module in exported.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if isinstance(node.target, OpOverload) and _trains(node):
                raise CaptureError(
                    f"the ExportedProgram was exported in training mode: {overload_name(node.target)} ({node.name}) "
                    "stands in it as it computes in training; call model.eval() before torch.export.export"
                )


def _trains(node: fx.Node) -> bool:
    name = overload_name(node.target).partition(".")[0]
    if name not in _TRAINS:
        return False
    declared = schema_of(node.target).arguments  # type: ignore[arg-type]
    given = dict(zip((a.name for a in declared), node.args, strict=False)) | node.kwargs
    return _TRAINS[name]({a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in declared})


def _drops(arguments: dict[str, Any]) -> bool:
    return bool(arguments["train"]) and arguments["p"] != 0


def _takes_batch_statistics(arguments: dict[str, Any]) -> bool:
    """A batch norm without running statistics does so in eval mode too."""
    return bool(arguments["training"]) and arguments["running_mean"] is not None


_TRAINS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "aten::dropout": _drops,
    "aten::feature_dropout": _drops,
    "aten::alpha_dropout": _drops,
    "aten::feature_alpha_dropout": _drops,
    "aten::dropout_": _drops,
    "aten::native_dropout": _drops,
    "aten::batch_norm": _takes_batch_statistics,
    "aten::native_batch_norm": _takes_batch_statistics,
    "aten::_native_batch_norm_legit": lambda arguments: bool(arguments["training"]) and "running_mean" in arguments,
    "aten::_native_batch_norm_legit_functional": _takes_batch_statistics,
    "aten::_batch_norm_with_update": lambda arguments: True,
    "aten::_batch_norm_with_update_functional": lambda arguments: True,
    "aten::rrelu": lambda arguments: bool(arguments["training"]),
    "aten::scaled_dot_product_attention": lambda arguments: arguments["dropout_p"] != 0,
}
"""Ops that compute something else in training, and the test of their arguments for it."""
