"""Sizes in an ExportedProgram: the symbols of each input, their ranges, and the guards of torch.export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.export.graph_signature import InputKind

from ir_tools.errors import CaptureError
from ir_tools.frontends.conditions import condition_from_text
from ir_tools.frontends.dynamic_shapes import UNBOUNDED
from ir_tools.frontends.symbols import LEAST_HINT, pinned
from ir_tools.ir.signature import Condition, DynamicSize, InputSpec
from ir_tools.torch_compat.export import guards_of
from ir_tools.torch_compat.symbols import ValueRanges, bounds_of


def enlarged(tensor: torch.Tensor, sizes: dict[int, DynamicSize]) -> torch.Tensor:
    """The tensor repeated along dynamic axes of size 0 or 1, so that torch.export does not take them for constants."""
    for axis in sizes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
        elif tensor.shape[axis] == 0:
            tensor = tensor.new_zeros([LEAST_HINT if i == axis else n for i, n in enumerate(tensor.shape)])
    return tensor


def exported_conditions(
    exported: torch.export.ExportedProgram, specs: Sequence[InputSpec], sources: Sequence[Sequence[str]]
) -> list[Condition]:
    """The conditions of torch.export on the sizes: its guards and ranges, in our names. `sources`: what guards call each input.

    Raises `CaptureError` when it made a constant of a size that is declared dynamic, or guards what is no size.
    """
    index_of = {source: i for i, names in enumerate(sources) for source in names}

    def size_of(source: str, axis: int) -> str | int | None:
        if source not in index_of:
            return None
        size = specs[index_of[source]].shape[axis]
        return size.name if isinstance(size, DynamicSize) else size

    found = []
    for spec, sizes in zip(specs, exported_sizes(exported), strict=True):
        for size, symbol in zip(spec.shape, sizes, strict=True):
            if isinstance(size, DynamicSize):
                if isinstance(symbol, int):
                    raise pinned(size.name, symbol)
                found += _in_range(size, exported_range(exported, symbol))
    for guard in guards_of(exported):
        try:
            condition = condition_from_text(guard, size_of)
        except CaptureError:
            raise CaptureError(f"torch.export guards {guard}, which cannot be checked when the file runs") from None
        if not condition.names and not condition.holds({}):
            raise CaptureError(f"torch.export guards {guard}, which does not hold for the sizes that are baked in")
        found.append(condition)
    return found


def exported_inputs(exported: torch.export.ExportedProgram) -> list[Any]:
    """What stands for each leaf of a call: a fake tensor, or the number or flag that was baked in."""
    placeholders = exported.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, exported.graph_signature.input_specs, strict=True)
    return [node.meta.get("val") for node, spec in pairs if spec.kind is InputKind.USER_INPUT]


def exported_sizes(exported: torch.export.ExportedProgram) -> list[list[Any]]:
    """Per tensor input: the sizes that torch.export gave it, numbers or symbols."""
    tensors = [value for value in exported_inputs(exported) if isinstance(value, torch.Tensor)]
    return [[int(s) if is_pinned(s) else s for s in tensor.shape] for tensor in tensors]


def is_pinned(size: int | torch.SymInt) -> bool:
    """A number, or a symbol that a guard made equal to one."""
    return isinstance(size, int) or bool(size.node.expr.is_number)


def exported_range(exported: torch.export.ExportedProgram, size: torch.SymInt) -> tuple[int, int | None]:
    """The least and the largest value of a size, None for no bound. torch writes 2 where it only says "not 0 or 1"."""
    ranges = exported.range_constraints
    expression = size.node.expr
    symbols = {s: ranges[s] for s in expression.free_symbols if s in ranges}
    free = {s: ValueRanges(1, r.upper) if r.lower <= LEAST_HINT else r for s, r in symbols.items()}
    given = bounds_of(expression, free)  # type: ignore[arg-type]
    if expression in ranges:
        given &= ranges[expression]
    least = int(given.lower) if given.lower > LEAST_HINT else 1
    return least, int(given.upper) if given.upper < UNBOUNDED else None


def _in_range(size: DynamicSize, bounds: tuple[int, int | None]) -> list[Condition]:
    """The bounds as conditions, where they are narrower than those of the size itself."""
    least, most = bounds
    found = [f"{size.name} >= {least}"] if least > size.least else []
    if most is not None and (size.most is None or most < size.most):
        found.append(f"{size.name} <= {most}")
    return [condition_from_text(text) for text in found]
