"""What the oracle lets through: the effects of passes, and what rounding alone does; and no more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ir_tools.rewrite.numeric_effects import NumericEffect
from passes.testing import InvariantBroken, Oracle
from passes.testing.invariants import Rounding, relative_error
from passes.testing.trial import captured


class Cancels(nn.Module):
    """Leaves 8 of the 16 digits of float64."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 1e8) - 1e8


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) * 2


def judged(model: nn.Module, move: Callable[[Tensor], Tensor], dtype: torch.dtype, *effects: NumericEffect) -> None:
    oracle: Oracle = captured(model.eval(), (torch.randn(4, 8).to(dtype),), "trace")
    oracle.judge(oracle.captured, [move(t.clone()) for t in oracle.example.outputs], frozenset(effects), "moved")


@pytest.mark.parametrize(
    "model, dtype, error",
    [(Plain(), torch.float64, 1e-12), (Cancels(), torch.float64, 1e-8), (Plain(), torch.float32, 1e-6),
     (Plain(), torch.bfloat16, 0.02), (Plain(), torch.float16, 0.002)],
)  # fmt: skip
def test_rounding_is_let_through(model: nn.Module, dtype: torch.dtype, error: float) -> None:
    judged(model, lambda t: t * (1 + error), dtype)


@pytest.mark.parametrize(
    "model, dtype, error",
    [(Plain(), torch.float64, 1e-9), (Cancels(), torch.float64, 1e-3), (Plain(), torch.float32, 1e-3),
     (Plain(), torch.bfloat16, 0.5), (Plain(), torch.float16, 0.2)],
)  # fmt: skip
def test_anything_more_is_not(model: nn.Module, dtype: torch.dtype, error: float) -> None:
    with pytest.raises(InvariantBroken, match="moved: relative error"):
        judged(model, lambda t: t * (1 + error), dtype)


@pytest.mark.parametrize(
    "move, why",
    [(lambda t: t[:2], "has shape"), (lambda t: t.float(), "has dtype"), (lambda t: t / 0, "holds NaN or Inf")],
)
def test_shapes_dtypes_and_infinities(move: Callable[[Tensor], Tensor], why: str) -> None:
    with pytest.raises(InvariantBroken, match=why):
        judged(Plain(), move, torch.float64)


def test_other_effects_are_given_more() -> None:
    judged(Plain(), lambda t: t * 1.2, torch.bfloat16, "lowers_precision")
    with pytest.raises(InvariantBroken, match="moved: relative error"):
        judged(Plain(), lambda t: t * 1.2, torch.bfloat16)


def test_rounding_moves_new_values_alone_and_little() -> None:
    x = torch.randn(5, dtype=torch.float64)
    with Rounding(1e-6, 0):
        y, view = x * 2, x.view(5, 1)
    assert 0 < relative_error([x * 2], [y]) <= 1e-6 and torch.equal(view.flatten(), x)
