"""Giving ops their operands in another dtype: one cast per value and dtype, constants cast ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir_tools.ir import Draft, facts
from ir_tools.ir.dialect import aten, bound_arguments, getitem, map_argument, nodes_in, short_name
from ir_tools.ir.facts import TensorFact, TupleFact
from ir_tools.ir.program import Block, public_name
from ir_tools.ir.regions import is_region

FILLED = frozenset("zeros ones full eye empty scalar_tensor".split())
"""Ops that fill a tensor with one number. With another `dtype` they give their cast result, if that dtype holds the number."""


@dataclass(frozen=True)
class Traffic:
    """A number of casts, and the bytes that they read and write in one run."""

    count: int = 0
    bytes: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.bytes + other.bytes)


@dataclass(frozen=True)
class Casts:
    """Casts between floating dtypes: in the graph before a pass, in the graph after it, and as per-op autocast has them
    (`one_by_one`: each op casts its own operands)."""

    before: Traffic = Traffic()
    one_by_one: Traffic = Traffic()
    after: Traffic = Traffic()

    def __add__(self, other: Casts) -> Casts:
        return Casts(self.before + other.before, self.one_by_one + other.one_by_one, self.after + other.after)


class Caster:
    """Casts within one draft.

    A value that was cast from a wanted dtype is read from its source instead of cast back. Values in `wide` may lie beyond
    the range of a narrower dtype: they are clamped to it before they are cast, so that finite values stay finite
    (`clamped_values`). Constants whose numbers had to be clamped are in `clamped`, by name.
    """

    def __init__(self, draft: Draft, made_by: str):
        self.draft = draft
        self.made_by = made_by
        self.wide: set[fx.Node] = set()
        self.clamped: set[str] = set()
        self.clamped_values: list[fx.Node] = []
        self._made: set[fx.Node] = set()
        self._versions: dict[fx.Node, dict[torch.dtype, fx.Node]] = {}

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node` in `dtype`."""
        before = facts.dtype(node)
        if before is None or before is dtype:
            return node
        if _widens(node) and node not in self.wide:
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

    def skip_idle(self) -> None:
        """Remove the model's own casts whose operand has their dtype by now: their users read the operand."""
        if not self._made:
            return
        mutated = self.draft.program.mutated_values
        for node in self.draft.program.calls:
            if node.target is not aten.to.dtype or node in mutated:
                continue
            given = bound_arguments(node)
            plain = not given["copy"] and given["memory_format"] is None
            if plain and given["self"] in self._made and facts.dtype(given["self"]) is facts.dtype(node):
                self.draft.redirect(node, given["self"])

    def restore_outputs(self, dtypes: Sequence[torch.dtype | None]) -> None:
        """Cast the Block's outputs back to `dtypes`."""
        output = self.draft.program.output
        for value, dtype in zip(list(nodes_in(output.args)), dtypes, strict=True):
            if dtype is not None and facts.dtype(value) is not dtype:
                self.draft.redirect_in(output, value, self.cast(value, dtype))

    def _new_cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        name, constant = str(node.target), self.draft.program.constant(node)
        if constant is not None:
            half = rounded(constant, dtype)
            if bool((half.to(constant.dtype) != constant.to(dtype).to(constant.dtype)).logical_and(constant.isfinite()).any()):
                self.clamped.add(public_name(name))
            name = f"{public_name(name)}@{self.made_by}"
            known = self.draft.program.constants.get(name)  # another block of the Program may have cast it already
            same = known is not None and known.dtype is dtype and known.shape == half.shape and torch.equal(known, half)
            return self.draft.constant(name, known if same else half)
        if is_filled(node) and node not in self.wide:
            with self.draft.before(node, self.made_by):
                new = self.draft.again(node, node.args, {**node.kwargs, "dtype": dtype})
            self._made.add(new)
            return new
        # Right behind the value, so that every later user may read it.
        limits, before = torch.finfo(dtype), facts.dtype(node)
        if node in self.wide and before is not None and limits.max < torch.finfo(before).max:
            self.clamped_values.append(node)
            node = self.draft.insert_after(node, (), self.made_by, aten.clamp.default, limits.min, limits.max)
        new = self.draft.insert_after(node, (), self.made_by, aten.to.dtype, dtype)
        self._made.add(new)
        return new


def _widens(node: fx.Node) -> bool:
    """A cast, made by the model, that loses nothing: its operand may be read in its place."""
    if node.target is not aten.to.dtype:
        return False
    source, to = facts.dtype(bound_arguments(node)["self"]), facts.dtype(node)
    return source is not None and to is not None and torch.promote_types(source, to) is to


def rounded(constant: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`constant` in `dtype`; finite values stay finite (a mask of `finfo(float32).min` would become an infinity)."""
    limits = torch.finfo(dtype)
    clamped = constant.clamp(limits.min, limits.max)
    return torch.where(constant.isfinite(), clamped, constant).to(dtype)


# -- questions about casts ----------------------------------------------------------------------------------------------


def is_filled(node: fx.Node) -> bool:
    """A new tensor that holds one number throughout, of a stated dtype."""
    return short_name(node.target) in FILLED and not node.all_input_nodes and "dtype" in node.kwargs


def parts(node: fx.Node) -> list[TensorFact]:
    """The facts of the tensors that an op gives in a tuple or list; none for a region, whose results have their own rules."""
    several = isinstance(facts.fact(node), TupleFact) and not is_region(node)
    return facts.tensors(node) if several else []


def whole(part: fx.Node) -> fx.Node | None:
    """The op of whose several results `part` is one, None for anything else."""
    container = bound_arguments(part)["container"] if part.target is getitem else None
    return container if container is not None and parts(container) else None


def users(value: fx.Node) -> list[fx.Node]:
    """The users of a value; for one that is several tensors, the users of its parts."""
    found = [r for user in value.users for r in (users(user) if whole(user) is value else [user])]
    return list(dict.fromkeys(found))


def is_read_whole(node: fx.Node) -> bool:
    """Several tensors that some user reads as one list."""
    return bool(parts(node)) and any(whole(user) is not node for user in node.users)


def state_nodes(block: Block) -> list[fx.Node]:
    """The values that a Block reads from its state."""
    return [node for node in block.graph.find_nodes(op="get_attr") if node.target in block.state]


def traffic(block: Block) -> Traffic:
    """The casts between floating dtypes that a Block makes in one run, those of the model itself among them."""
    found = Traffic()
    for node in block.calls:
        if short_name(node.target) == "to":
            source, to = facts.dtype(bound_arguments(node)["self"]), facts.dtype(node)
            if source is not None and to is not None and source is not to and source.is_floating_point and to.is_floating_point:
                found += Traffic(1, bytes_of_cast(node, source, to))
    return found


def bytes_of_cast(value: fx.Node, source: torch.dtype, to: torch.dtype) -> int:
    """Bytes that casting a value reads and writes, at the sizes of the example; 0 where they are unknown."""
    sizes = facts.example_shape(value)
    return 0 if sizes is None else math.prod(sizes) * (source.itemsize + to.itemsize)
