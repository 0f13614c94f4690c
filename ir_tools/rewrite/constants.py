"""Which nodes depend on constants only, and what they evaluate to."""

from __future__ import annotations

import torch
from torch import fx

from ir_tools.ir import Block, facts
from ir_tools.ir.dialect import DIALECT_ONLY, map_argument
from ir_tools.ir.effects import has_effect
from ir_tools.ir.prepack import prepack_of
from ir_tools.torch_compat.operators import OpOverload


def is_foldable(program: Block, node: fx.Node) -> bool:
    """The node gives one tensor, which is read; no effect, no prepacking; its tensor operands are constants, not state."""
    if not node.users or not isinstance(node.target, OpOverload) or node.target in DIALECT_ONLY or has_effect(node):
        return False
    if prepack_of(node) is not None or facts.tensor(node) is None:
        return False
    return all(program.constant(n) is not None for n in node.all_input_nodes)


def evaluate(program: Block, node: fx.Node) -> tuple[torch.Tensor, int]:
    """The tensor that a foldable node gives (a copy that shares nothing), and the bytes of its operands together."""

    def look_up(leaf: object) -> object:
        return program.constant(leaf) if isinstance(leaf, fx.Node) else leaf

    args = [map_argument(a, look_up) for a in node.args]
    kwargs = {k: map_argument(v, look_up) for k, v in node.kwargs.items()}
    with torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    operands = {str(n.target): n for n in node.all_input_nodes}
    return value.clone(), sum(program.constants[name].nbytes for name in operands)
