"""What values are read as: divisors and masks, through ops that move them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir.dialect import short_name
from passes.analysis.roles import divisors, mask_values
from passes.precision.op_table import MOVES
from tests.check import captured
from tests.passes.precision.half_casts import Model

X = torch.rand(4, 4) + 1


def names(found: frozenset) -> set[str]:
    """Ops by name, inputs by number."""
    return {str(n.target).strip("inputs_") if n.op == "placeholder" else short_name(n.target) for n in found}


def test_divisors_are_found_through_moves_and_no_further() -> None:
    def function(m: nn.Module, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return x / y.t().reshape(4, 4) + (z * 2).relu().log() + x.neg()

    program = captured(Model(function).eval(), X, X, X)
    assert names(divisors(program, MOVES)) == {"1", "t", "reshape", "relu", "mul"}, "z itself is multiplied first"
    assert names(divisors(program, frozenset())) == {"reshape", "relu"}, "what moves is an argument"


def test_masks_are_what_is_added_before_a_softmax() -> None:
    def function(m: nn.Module, x: Tensor, mask: Tensor, other: Tensor, bias: Tensor) -> Tensor:
        scores = (x * 2 + mask[None] + other.t()).softmax(-1)[0]
        return F.scaled_dot_product_attention(scores[None], x[None], x[None], attn_mask=bias[None]) * other

    program = captured(Model(function).eval(), X, X, X, X)
    found = names(mask_values(program, MOVES))
    assert {"1", "2", "3", "t", "mul", "add"} <= found and not {"0", "softmax"} & found


def test_a_value_with_two_users_may_have_both_roles() -> None:
    program = captured(Model(lambda m, x: x.softmax(-1) / x).eval(), X)
    assert names(divisors(program, MOVES)) == names(mask_values(program, MOVES)) == {"0"}
