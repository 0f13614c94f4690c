"""How far numbers may be off: a test for each cell of the table of tolerances, by an effect of passes and a float dtype.

On both sides of the figure; and an honest pass of that effect, on a small model in that dtype, stays within it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir.dialect import aten
from ir_tools.rewrite import Call, Ops, table_pass
from ir_tools.verify.numerics import SMALLEST_SQNR_DB
from passes import CATALOGUE, NumericsError, Pass, optimize
from tests.check import with_random_statistics

CELLS = [(effect, dtype) for effect, row in SMALLEST_SQNR_DB.items() for dtype in row]
cells = pytest.mark.parametrize("effect, dtype", CELLS, ids=lambda part: str(part).removeprefix("torch."))


class Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


def off_by(decibels: float, effect: Any) -> Pass:
    """A pass of this effect, after which the numbers are off by so much."""

    def scaled(op: Ops, call: Call) -> Any:
        return op.mul(op.tanh(call.self), 1 + 10 ** (-decibels / 20))

    return table_pass("off", {aten.tanh.default: scaled}, effects={effect}, doc="")


def values(dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@cells
def test_both_sides_of_the_figure(effect: str, dtype: torch.dtype) -> None:
    smallest, x = SMALLEST_SQNR_DB[effect][dtype], values(dtype)
    fast = optimize(Tanh().eval(), [off_by(smallest + 0.5, effect)], example_inputs=x, engine="aten")
    step = fast.report.steps[0]
    assert step.tolerance == f"SQNR >= {smallest:g} dB" and smallest < step.sqnr_db < smallest + 1
    with pytest.raises(NumericsError, match=rf"the pass off .*SQNR .* dB, allowed {smallest:g} dB"):
        optimize(Tanh().eval(), [off_by(smallest - 0.5, effect)], example_inputs=x, engine="aten")


# -- honest passes --------------------------------------------------------------------------------------------------------


def small_net(dtype: torch.dtype) -> nn.Module:
    """Convolutions and a linear: the noise of all its layers is in the outputs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    return with_random_statistics(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 4 * 4, 10))).to(dtype)


def to_int8(op: Ops, value: Any, largest: float, zero_point: float = 0.0) -> Any:
    """Rounded to 255 steps from -largest to largest, and back; `zero_point` is added and not taken off again."""
    scale = largest / 127
    steps = op.clamp(op.round(op.mul(value, 1 / scale)), -127.0, 127.0)
    return op.mul(op.add(steps, zero_point), scale)


def quantizing(largest_input: float, zero_point: float = 0.0) -> Pass:
    """Weights and inputs of every layer, per tensor. Honest where `largest_input` is, and nothing is forgotten."""

    def entry(op: Ops, call: Call) -> Any:
        largest = largest_input
        x = to_int8(op, call.input, largest, zero_point)
        w = to_int8(op, call.weight, 0.6)
        if call.target is aten.linear.default:
            return op.linear(x, w, call.bias)
        return op.conv2d(x, w, call.bias, call.stride, call.padding, call.dilation, call.groups)

    table = {aten.conv2d.default: entry, aten.linear.default: entry}
    return table_pass("quantizing", table, effects={"quantizes"}, doc="")


def linear_in_float32(op: Ops, call: Call) -> Any:
    x, w, b = (op.to(value, torch.float32) for value in (call.input, call.weight, call.bias))
    return op.to(op.linear(x, w, b), torch.float64)


def honest(effect: str, dtype: torch.dtype) -> Pass:
    if effect == "lowers_precision" and dtype is torch.float32:
        return table_pass("float64_in_float32", {aten.linear.default: linear_in_float32}, effects={effect}, doc="")
    if effect == "lowers_precision":
        return CATALOGUE["cast_half"].with_options(dtype=dtype, on_slower="keep")
    return CATALOGUE["fuse_conv_bn"] if effect == "rounds" else quantizing(largest_input=8.0)


@cells
def test_an_honest_pass_of_this_effect_is_within(effect: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    model = small_net(dtype)
    if effect == "lowers_precision":  # from the dtype of twice the width
        wider = torch.float64 if dtype is torch.float32 else torch.float32
        model, x = model.to(wider), x.to(wider)
    step = optimize(model, [honest(effect, dtype)], example_inputs=x, engine="aten").report.steps[0]
    assert step.rewrites and effect in step.effects
    assert SMALLEST_SQNR_DB[effect][dtype] + 3 < step.sqnr_db, "with something to spare"


BROKEN = {"clips": quantizing(largest_input=0.3), "forgets the zero point": quantizing(8.0, zero_point=32.0)}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("dtype", SMALLEST_SQNR_DB["quantizes"])
def test_a_broken_quantization_is_not(broken: str, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    with pytest.raises(NumericsError, match=r"the pass quantizing .*allowed 6.5 dB"):
        optimize(small_net(dtype), [BROKEN[broken]], example_inputs=x, engine="aten")
