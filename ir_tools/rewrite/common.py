"""Common subexpressions: keys that are equal for ops with equal results, and what keeps two such ops apart."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import fx

from ir_tools.ir import Block, facts
from ir_tools.ir.alias_analysis import derived, is_handed_out
from ir_tools.ir.dialect import aten, bound_arguments, getitem, nodes_in
from ir_tools.ir.effects import has_effect
from ir_tools.ir.host import CONSTRUCTORS
from ir_tools.ir.prepack import has_mark
from ir_tools.ir.program import public_name
from ir_tools.ir.regions import is_region
from ir_tools.torch_compat.operators import OpOverload

LARGEST_CONSTANT = 1 << 20
"""Bytes up to which constants of the user's own are compared. Those that passes made are compared at any size."""

SAMPLED = 4096
"""About how many bytes of a constant are summed as a first comparison; where the sums agree, all bytes are compared."""

EXCHANGEABLE = frozenset({aten.add.Tensor, aten.mul.Tensor})
"""Ops that give the same bits for two real operands in either order (`add` where alpha is 1): sums and products of IEEE 754."""


class Keys:
    """Keys of the ops of a block: equal where two ops give equal tensors, operand by operand and bit by bit."""

    def __init__(self, block: Block):
        self.block = block
        self._alike: dict[Hashable, list[fx.Node]] = {}
        self._representative: dict[fx.Node, fx.Node] = {}

    def of(self, node: fx.Node) -> Hashable | None:
        """The key of an op, None for one that must run each time: it has an effect, draws random numbers, or is a region."""
        if not isinstance(node.target, OpOverload) and node.target is not getitem:
            return None
        if is_region(node) or node.target in CONSTRUCTORS or has_effect(node):
            return None
        arguments = bound_arguments(node)
        given = {name: self._literal(value) for name, value in arguments.items()}
        known = facts.dtype(node)
        real = known is not None and not known.is_complex  # a complex product adds two products, one of them rounded
        if real and node.target in EXCHANGEABLE and arguments.get("alpha", 1) == 1:
            given["self"], given["other"] = sorted((given["self"], given["other"]), key=_name)
        return node.target, has_mark(node), tuple(given.items())

    def _literal(self, value: Any) -> Hashable:
        """The key of a literal, which includes its type: 1, 1.0 and True have different keys; so have 0.0 and -0.0."""
        if isinstance(value, fx.Node):
            return self._constant(value)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._literal, value))
        return type(value), (repr(value) if isinstance(value, (float, complex)) else value)

    def _constant(self, node: fx.Node) -> fx.Node:
        """The first constant with the same bytes in the same layout; any other value unchanged."""
        if node not in self._representative:
            self._representative[node] = self._first_alike(node)
        return self._representative[node]

    def _first_alike(self, node: fx.Node) -> fx.Node:
        tensor = self.block.constant(node)
        name = str(node.target)
        if tensor is None or tensor.layout is not torch.strided or tensor.is_quantized:
            return node
        if tensor.nbytes > LARGEST_CONSTANT and name == public_name(name):
            return node
        raw = _bytes_of(tensor)
        sample = int(raw[:: 1 + len(raw) // SAMPLED].sum(dtype=torch.int64))
        looks = tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, sample
        alike = self._alike.setdefault(looks, [])
        for other in alike:
            if torch.equal(raw, _bytes_of(self.block.constants[str(other.target)])):
                return other
        alike.append(node)
        return node


def _name(value: Any) -> str:
    return value.name if isinstance(value, fx.Node) else repr(value)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return plain.view(torch.uint8)


def why_apart(first: fx.Node, node: fx.Node, mutated: frozenset[fx.Node]) -> str | None:
    """Why `node` must not be replaced by `first`, an op with the same key; None when it may be."""
    if any(value in mutated for value in (first, node, *nodes_in([*node.args, *node.kwargs.values()]))):
        return "its operands or result are written in place"
    one, other = facts.tensor(first), facts.tensor(node)
    if one is not None and other is not None and not facts.same_layout(one, other):
        return "the two results lie in memory in different orders"
    if is_handed_out(derived(node)) and is_handed_out(derived(first)):
        return "both results are outputs of the model, which must not share memory"
    return None
