"""Giving ops their operands in another dtype: one cast per value and dtype, constants cast ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ir_tools.ir import Draft, facts
from ir_tools.ir.dialect import aten, bound_arguments, map_argument, nodes_in
from ir_tools.ir.program import public_name

FLOATS = (torch.float32, torch.float64)


class Caster:
    """Casts within one draft.

    A value that was cast from a wanted dtype is read from its source instead of cast back. Values in `wide` may lie beyond
    the range of a narrower dtype: they are clamped to it before they are cast, so that finite values stay finite.
    """

    def __init__(self, draft: Draft, made_by: str):
        self.draft = draft
        self.made_by = made_by
        self.wide: set[fx.Node] = set()
        self._made: set[fx.Node] = set()
        self._versions: dict[fx.Node, dict[torch.dtype, fx.Node]] = {}

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype`."""
        before = facts.dtype(node)
        if before is None or before is dtype:
            return node
        if _widens(node):
            return self.cast(bound_arguments(node)["self"], dtype)
        versions = self._versions.setdefault(node, {before: node})
        if dtype not in versions:
            versions[dtype] = self._new_cast(node, dtype)
            self._versions[versions[dtype]] = versions
        return versions[dtype]

    def recompute(self, node: fx.Node, dtype: torch.dtype, wanted: Callable[[fx.Node], bool]) -> fx.Node:
        """The op of `node` with those operands in `dtype` for which `wanted(operand)` holds.

        Gives `node` itself when no operand changes, now or because an earlier op was recomputed.
        """

        def operand(leaf: Any) -> Any:
            return self.cast(leaf, dtype) if isinstance(leaf, fx.Node) and wanted(leaf) else leaf

        args = [map_argument(a, operand) for a in node.args]
        kwargs = {k: map_argument(v, operand) for k, v in node.kwargs.items()}
        unchanged = args == [map_argument(a, lambda leaf: leaf) for a in node.args] and kwargs == dict(node.kwargs)
        if unchanged and not any(n in self._made for n in (*nodes_in(args), *nodes_in(kwargs))):
            return node
        with self.draft.before(node, self.made_by):
            new = self.draft.again(node, args, kwargs)
        self._made.add(new)
        self.draft.replace(node, new)
        return new

    def restore_outputs(self, dtypes: Sequence[torch.dtype | None]) -> None:
        """Cast the Block's outputs back to `dtypes`."""
        output = self.draft.program.output
        for value, dtype in zip(list(nodes_in(output.args)), dtypes, strict=True):
            if dtype is not None and facts.dtype(value) is not dtype:
                self.draft.redirect_in(output, value, self.cast(value, dtype))

    def _new_cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        constant = self.draft.program.constant(node)
        if constant is not None:
            return self.draft.constant(f"{public_name(str(node.target))}@{self.made_by}", rounded(constant, dtype))
        # Right behind the value, so that every later reader may use it.
        if node in self.wide and dtype.is_floating_point:
            limits = torch.finfo(dtype)
            node = self.draft.insert_after(node, (), self.made_by, aten.clamp.default, limits.min, limits.max)
        new = self.draft.insert_after(node, (), self.made_by, aten.to.dtype, dtype)
        self._made.add(new)
        return new


def _widens(node: fx.Node) -> bool:
    """A cast, made by the model, that loses nothing: what it reads may be read in its place."""
    if node.target is not aten.to.dtype:
        return False
    source, to = facts.dtype(bound_arguments(node)["self"]), facts.dtype(node)
    return source is not None and to is not None and torch.promote_types(source, to) is to


def rounded(constant: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`constant` in `dtype`; finite values stay finite (a mask of `finfo(float32).min` would become an infinity)."""
    limits = torch.finfo(dtype)
    clamped = constant.clamp(limits.min, limits.max)
    return torch.where(constant.isfinite(), clamped, constant).to(dtype)


def is_float(node: fx.Node) -> bool:
    """A float32 or float64 tensor (half and integer values are left as the user made them)."""
    return facts.dtype(node) in FLOATS
