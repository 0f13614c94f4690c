"""Dynamic sizes as the user declares them, in torch.export's convention.

    dynamic_shapes={"x": {0: Dim("batch"), 2: Dim("height", min=32)}}       by the names of forward's arguments
    dynamic_shapes=({0: Dim("batch")}, None)                                or by position

A Dim names a size and bounds it; sizes of one name are equal in every call.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.export import Dim

from ir_tools.errors import DynamicShapesError
from ir_tools.ir.signature import DynamicSize, InputSpec
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.export import DimHint, DimHintKind

UNBOUNDED = 2**62
"""A bound this large means no bound: torch has several values for infinity."""


def declared_sizes(dynamic_shapes: Any, arguments: dict[str, Any]) -> list[dict[int, DynamicSize]]:
    """Per tensor of a bound call, in pytree order: its dynamic axes.

    Raises `DynamicShapesError` naming the argument.
    """
    by_name = _by_name(dynamic_shapes, arguments)
    found: list[dict[int, DynamicSize]] = []
    for name, value in arguments.items():
        found += _of_value(by_name.get(name), value, name)
    if dynamic_shapes is not None and not any(found):
        raise DynamicShapesError("dynamic_shapes declares no size dynamic; leave it out, or give a Dim for an axis")
    _keep_apart(found)
    _check_agreement(found, [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)])
    return found


def _keep_apart(found: list[dict[int, DynamicSize]]) -> None:
    """Sizes without a Dim are named by argument and axis, which gives `x[0]` and `x_0` one name: each gets a unique one."""
    taken: set[str] = set()
    for own in found:
        for axis, size in own.items():
            if size.name.endswith("_"):
                while size.name in taken:
                    size = replace(size, name=f"{size.name}_")
                own[axis] = size
                taken.add(size.name)


def _check_agreement(found: list[dict[int, DynamicSize]], tensors: list[torch.Tensor]) -> None:
    """Sizes of one name have one range, and are equal in the example."""
    first: dict[str, tuple[DynamicSize, int]] = {}
    for own, tensor in zip(found, tensors, strict=True):
        for axis, size in own.items():
            other, given = first.setdefault(size.name, (size, tensor.shape[axis]))
            if other != size:
                raise DynamicShapesError(f"two sizes are called {size.name!r} and have different ranges; give one a new name")
            if given != tensor.shape[axis]:
                raise DynamicShapesError(
                    f"sizes of one Dim are equal in every call, but {size.name!r} is {given} and {tensor.shape[axis]} "
                    "in the example; give each axis its own Dim"
                )


def _by_name(dynamic_shapes: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    if dynamic_shapes is None:
        return {}
    names = ", ".join(arguments)
    if isinstance(dynamic_shapes, dict):
        unknown = [name for name in dynamic_shapes if name not in arguments]
        if unknown:
            raise DynamicShapesError(f"dynamic_shapes names {unknown[0]!r}, which is no argument of the call; it has: {names}")
        return dynamic_shapes
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(arguments):
            raise DynamicShapesError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(arguments)} arguments ({names}); give one for each"
            )
        return dict(zip(arguments, dynamic_shapes, strict=True))
    given = type(dynamic_shapes).__name__
    raise DynamicShapesError(f"dynamic_shapes must be a dict or a tuple, as for torch.export, got {given}")


def _of_value(spec: Any, value: Any, path: str) -> list[dict[int, DynamicSize]]:
    """The dynamic axes of every tensor in an argument."""
    if isinstance(value, torch.Tensor):
        return [_of_tensor(spec, value, path)]
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if spec is None or (not leaves and all(part is None for part in pytree.tree_leaves(spec))):
        return [{} for _ in leaves]
    if isinstance(value, dict) and isinstance(spec, dict) and spec.keys() <= value.keys():
        return [d for key, part in value.items() for d in _of_value(spec.get(key), part, f"{path}[{key!r}]")]
    if isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)) and len(spec) == len(value):
        pairs = enumerate(zip(value, spec, strict=True))
        return [d for i, (part, own) in pairs for d in _of_value(own, part, f"{path}[{i}]")]
    raise DynamicShapesError(f"dynamic_shapes of '{path}' must have the structure of the argument, got {spec!r}")


def _of_tensor(spec: Any, value: torch.Tensor, path: str) -> dict[int, DynamicSize]:
    if spec is None:
        return {}
    if isinstance(spec, (list, tuple)):
        if len(spec) != value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' has {len(spec)} entries, the tensor {value.dim()} axes")
        spec = dict(enumerate(spec))
    if not isinstance(spec, dict):
        raise DynamicShapesError(f"dynamic_shapes of '{path}' must be a dict of axes, a tuple or None, got {spec!r}")
    sizes: dict[int, DynamicSize] = {}
    seen: set[int] = set()
    for axis, dim in spec.items():
        if not isinstance(axis, int) or not -value.dim() <= axis < value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' names axis {axis!r}; the tensor has {value.dim()}")
        if axis % value.dim() in seen:
            raise DynamicShapesError(f"dynamic_shapes of '{path}' names axis {axis} twice")
        seen.add(axis % value.dim())
        size = _size(dim, value.shape[axis], f"{path}_{axis % value.dim()}", path, axis)
        if size is not None:
            sizes[axis % value.dim()] = size
    return sizes


def _size(dim: Any, given: int, name: str, path: str, axis: int) -> DynamicSize | None:
    """The declared size, None for one that is baked in."""
    if dim is None or (isinstance(dim, int) and dim == given):
        return None
    if isinstance(dim, DimHint):
        if dim.type is DimHintKind.STATIC:
            return None
        called = re.sub(r"\W+", "_", name)  # `_named` keeps such names free
        size = DynamicSize(f"{called}_", max(1, dim.min or 1), dim.max)
    elif isinstance(dim, Dim) and not hasattr(dim, "root"):
        size = DynamicSize(_named(dim, path, axis), max(1, int(dim.min)), int(dim.max) if dim.max < UNBOUNDED else None)
    else:
        raise DynamicShapesError(
            f"axis {axis} of '{path}' must be a torch.export.Dim, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC or None, got {dim!r} "
            f"(the example has {given}); a size that is computed from another's, such as 2 * batch, is found by itself: give "
            "each axis its own Dim"
        )
    if not size.holds(given):
        raise DynamicShapesError(f"axis {axis} of '{path}' is {given} in the example, but {size.name} must be {size.allowed}")
    return size


def _named(dim: Any, path: str, axis: int) -> str:
    """The name of a Dim, which stands in conditions and in the file. Names that end in _ are those of sizes without one."""
    name = str(dim.__name__)
    if name in ("max", "min") or keyword.iskeyword(name) or not name.isascii() or name.endswith("_"):
        raise DynamicShapesError(
            f"the Dim of axis {axis} of '{path}' is called {name!r}, which cannot stand in a condition; choose another name, "
            "in plain letters, that is no word of Python and does not end in _"
        )
    return name


def specified(specs: Sequence[InputSpec], sizes: Sequence[dict[int, DynamicSize]]) -> tuple[InputSpec, ...]:
    """Input specs in which the declared axes are dynamic."""
    out = [
        replace(spec, shape=tuple(own.get(axis, size) for axis, size in enumerate(spec.shape)))
        for spec, own in zip(specs, sizes, strict=True)
    ]
    return tuple(out)
