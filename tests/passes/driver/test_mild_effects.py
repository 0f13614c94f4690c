"""Passes whose effects are milder than what they do: caught, whatever they or earlier passes did to the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir.dialect import aten
from ir_tools.rewrite import Call, Ops, table_pass
from passes import NumericsError, Pass, graph_pass, optimize
from tests.check import with_random_statistics

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KEEP = "cast_half:on_slower=keep"


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return with_random_statistics(nn.Sequential(*layers))


def linear_in(dtype: torch.dtype, back: torch.dtype, effects: Any) -> Pass:
    """Linears computed in another dtype."""

    def entry(op: Ops, call: Call) -> Any:
        x, w, b = (op.to(value, dtype) for value in (call.input, call.weight, call.bias))
        return op.to(op.linear(x, w, b), back)

    return table_pass("narrow", {aten.linear.default: entry}, effects=effects, doc="")


def relu_by(build: Any, effects: Any) -> Pass:
    return table_pass("wrong", {aten.relu.default: lambda op, call: build(op, call.self)}, effects=effects, doc="")


MILD: list[Any] = [(), {"rounds"}, {"non_finite_may_become_finite"}, {"rounds", "non_finite_may_become_finite"}]


def in_order(effects):
    """An id that is the same in every process."""
    return "+".join(sorted(effects)) or "none"


@pytest.mark.parametrize("verify", ["each", "ends"])
@pytest.mark.parametrize("effects", MILD, ids=in_order)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_a_half_dtype_that_no_effect_speaks_of_is_an_error(dtype: torch.dtype, effects: Any, verify: str) -> None:
    pass_ = linear_in(dtype, torch.float32, effects)
    if dtype is torch.float8_e5m2:  # a linear does not run in it; a value that passes through it is held in it all the same
        pass_ = relu_by(lambda op, x: op.to(op.to(op.relu(x), dtype), torch.float32), effects)
        pass_ = Pass("narrow", pass_.function, pass_.effects)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        NumericsError, match=rf"the pass narrow computes in {name}, a lower precision .* add 'lowers_precision'"
    ):
        optimize(net(), [pass_], example_inputs=X, engine="aten", verify=verify)


@pytest.mark.parametrize("effects", [{"lowers_precision"}, {"rounds", "lowers_precision"}, {"quantizes"}], ids=in_order)
def test_one_that_an_effect_speaks_of_is_none(effects: Any) -> None:
    report = optimize(net(), [linear_in(torch.bfloat16, torch.float32, effects)], example_inputs=X, engine="aten").report
    assert report.steps[0].rewrites and 20 < report.steps[0].sqnr_db < 80


def test_float64_in_float32_is_lower_precision_too() -> None:
    model, x = net().double(), X.double()
    with pytest.raises(NumericsError, match="the pass narrow computes in float32, a lower precision than the graph had"):
        optimize(model, [linear_in(torch.float32, torch.float64, {"rounds"})], example_inputs=x, engine="aten")
    step = optimize(
        model, [linear_in(torch.float32, torch.float64, {"lowers_precision"})], example_inputs=x, engine="aten"
    ).report.steps[0]
    assert step.tolerance == "SQNR >= 80 dB" and 80 < step.sqnr_db < 200


def test_complex128_in_complex64_is_lower_precision_too() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.reciprocal(x)

    narrow = table_pass(
        "narrow",
        {aten.reciprocal.default: lambda op, call: op.to(op.reciprocal(op.to(call.self, torch.complex64)), torch.complex128)},
        effects={"rounds"},
        doc="",
    )
    x = torch.randn(4, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NumericsError, match="the pass narrow computes in float32, a lower precision"):
        optimize(Products().eval(), [narrow], example_inputs=x, engine="aten")


def test_a_wider_dtype_and_one_that_was_there_need_no_effect_but_rounding() -> None:
    wide = linear_in(torch.float64, torch.float32, {"rounds"})
    assert optimize(net(), [wide], example_inputs=X, engine="aten").report.steps[0].rewrites
    half = linear_in(torch.bfloat16, torch.bfloat16, {"rounds"})
    optimize(net().bfloat16(), [half], example_inputs=X.bfloat16(), engine="aten")


# -- behind a pass that lowers precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("factor", [1.3, 0.7, 1.12])
def test_what_was_lowered_before_excuses_no_later_step(dtype: str, factor: float) -> None:
    wrong = relu_by(lambda op, x: op.mul(op.relu(x), factor), {"rounds"})
    with pytest.raises(NumericsError, match=r"the pass wrong .*, against the step before: SQNR .* dB, allowed \d+ dB"):
        optimize(net(), [f"{KEEP}:dtype={dtype}", wrong], example_inputs=X, engine="aten")


def test_nor_do_earlier_steps_that_quantized() -> None:
    def steps_of(op: Ops, call: Call) -> Any:
        return op.linear(op.mul(op.round(op.mul(call.input, 32.0)), 1 / 32), call.weight, call.bias)

    quantizing = table_pass("quantizing", {aten.linear.default: steps_of}, effects={"quantizes"}, doc="")
    wrong = relu_by(lambda op, x: op.mul(op.relu(x), 1.3), {"rounds"})
    with pytest.raises(NumericsError, match=r"the pass wrong .*, against the step before"):
        optimize(net(), [quantizing, wrong], example_inputs=X, engine="aten")
    half_of_it = relu_by(lambda op, x: op.mul(op.relu(x), 1.3), {"rounds", "lowers_precision"})
    with pytest.raises(NumericsError, match=r"the pass wrong .*"):
        optimize(net(), [quantizing, half_of_it], example_inputs=X, engine="aten")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_in_the_half_dtype_is_within(dtype: str) -> None:
    """The relu of a half value, times 1 + eps: half of all values move by one unit in the last place."""
    half = getattr(torch, dtype)

    def one_unit_up(op: Ops, x: Any) -> Any:
        return op.mul(op.relu(x), 1 + torch.finfo(half).eps)

    steps = optimize(
        net(), [f"{KEEP}:dtype={dtype}", relu_by(one_unit_up, {"rounds"})], example_inputs=X, engine="aten"
    ).report.steps
    assert steps[1].rewrites and steps[1].sqnr_db > 20


def test_the_users_tolerance_holds_against_the_step_before_too() -> None:
    wrong = relu_by(lambda op, x: op.mul(op.relu(x), 1.12), {"rounds"})
    optimize(net(), [KEEP, wrong], example_inputs=X, engine="aten", tolerance=8)


class Amplifies(nn.Module):
    """A chaotic map: each step doubles the noise of the ones before."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.head = steps, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.head(x))
        for _ in range(self.steps):
            y = torch.relu(y * (1 - y) * 3.7)
        return y


def test_a_model_that_amplifies_rounding_passes() -> None:
    """Its noise in bfloat16 is what the model makes of it: as much of a step is not asked for less."""
    torch.manual_seed(0)
    model, x = Amplifies(7).eval(), torch.randn(8, 64)
    one_unit_up = relu_by(lambda op, y: op.mul(op.relu(y), 1 + 2.0**-8), {"rounds"})
    report = optimize(model, [f"{KEEP}:level=O3", one_unit_up], example_inputs=x, engine="aten").report
    assert report.steps[1].rewrites and report.steps[0].sqnr_db < 26, "less than the cell of the table and a bit"


# -- only what was no number may become one -----------------------------------------------------------------------------

ONLY_NON_FINITE: Any = {"non_finite_may_become_finite"}


class Logs(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(torch.relu(x))


V = torch.tensor([-1.0, 0.0, 1.5, 2.0])


def test_a_pass_that_only_makes_numbers_of_nan_and_inf_moves_no_number() -> None:
    def finite(op: Ops, call: Call) -> Any:
        return op.clamp_min(op.log(call.self), -100.0)

    stable = table_pass("stable", {aten.log.default: finite}, effects=ONLY_NON_FINITE, doc="")
    fast = optimize(Logs().eval(), [stable], example_inputs=V, engine="aten")
    assert fast.report.steps[0].tolerance == "bitwise, where the model gives no NaN or Inf" and fast(V)[0] == -100


@pytest.mark.parametrize("before, factor", [([], 1 + 2.0**-22), (["fuse_conv_bn"], 1 + 2.0**-22), ([KEEP], 1 + 2.0**-7)])
def test_one_bit_is_too_much(before: list[Any], factor: float) -> None:
    moving = relu_by(lambda op, x: op.mul(op.relu(x), factor), ONLY_NON_FINITE)
    with pytest.raises(NumericsError, match="it is declared exact but for NaN and Inf, but outputs moved by up to"):
        optimize(nn.Sequential(net(), nn.ReLU()).eval(), [*before, moving], example_inputs=X, engine="aten")


def test_nor_may_a_number_become_nan() -> None:
    def poisoned(op: Ops, call: Call) -> Any:
        return op.log(op.sub(call.self, 1.75))

    wrong = table_pass("wrong", {aten.log.default: poisoned}, effects=ONLY_NON_FINITE, doc="")
    with pytest.raises(NumericsError, match="output 0 holds NaN or Inf where the reference is finite"):
        optimize(Logs().eval(), [wrong], example_inputs=V, engine="aten")


def test_behind_such_a_pass_a_step_without_the_effect_leaves_nan_and_numbers_where_they_are() -> None:
    """The model gives -Inf at two elements, the first pass 0 there; the second may not write there what it likes."""

    @graph_pass(effects={"rounds", "non_finite_may_become_finite"})
    def opens(program, log):
        return stable(program, log=log)

    stable = table_pass(
        "stable", {aten.log.default: lambda op, call: op.clamp_min(op.log(call.self), -5.0)}, effects={"rounds"}, doc=""
    )
    spoils = table_pass(
        "spoils", {aten.clamp_min.default: lambda op, call: op.clamp_min(call.self, -7.0)}, effects={"rounds"}, doc=""
    )
    with pytest.raises(NumericsError, match=r"the pass spoils .*, against the step before: SQNR"):
        optimize(Logs().eval(), [opens, spoils], example_inputs=V, engine="aten")
