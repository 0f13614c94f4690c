"""Branches and loops: the ranges seen in them decide as outside, and what was not run stays float with that reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import short_name
from passes import optimize
from passes.precision import reasons
from tests.check import captured, outputs_of, relative_error
from tests.passes.precision.half_casts import HALVES, LEVELS, WITHIN, cast_half, seen_on

X = torch.tensor([[0.5, -1.0, 2.0, 1.5], [1.0, 0.25, -0.5, 3.0]])
LARGE = {"bfloat16": 1e38, "float16": 3e4}


def in_halves(program: Program) -> dict[str, bool]:
    """name of each op, in bodies too -> whether its result is half."""
    return {node.name: facts.dtype(node) in HALVES.values() for node in program.all_calls if short_name(node.target) != "to"}


def linear(factor: float = 1.0) -> nn.Linear:
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4) * factor)
    return layer


class Branch(nn.Module):
    """The branch overflows half precision in one product, which comes back into the range behind it."""

    def __init__(self, large: float):
        super().__init__()
        self.a, self.b, self.large = linear(), linear(), large

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if bool(y.sum() > 0):
            y = self.b(y) * self.large * (1 / self.large)
        else:
            y = self.b(y.abs()) * 2.0
        return y


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_product_that_overflows_in_the_branch_taken_stays_float(dtype: str, level: str) -> None:
    model = Branch(LARGE[dtype]).eval()
    program = captured(model, X, frontend="script")
    after, log = seen_on(program, X, dtype=dtype, level=level)
    found, said = in_halves(after), {r.site: r.reason for r in log.refusals}
    assert found["if1_then_linear_1"] and not found["if1_then_mul"]
    assert said["cast_half@if1_then_mul"] in (reasons.OVERFLOWS, reasons.IS_WIDE)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN[dtype]
    assert said["cast_half@if1_else_linear_1"] == reasons.NOT_RUN and not found["if1_else_linear_1"]


@pytest.mark.parametrize("dtype", HALVES)
def test_without_ranges_ops_in_bodies_are_cast_as_outside(dtype: str) -> None:
    """Nothing was observed, so nothing was observed not to run."""
    program = captured(Branch(2.0).eval(), X, frontend="script")
    after = cast_half.with_options(dtype=dtype)(program)
    assert [half for name, half in in_halves(after).items() if "linear" in name] == [True] * 3


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.a = linear(1e4), linear()

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() > 0):
            x = self.w(x * 100.0) / 1e4
        return x


@pytest.mark.parametrize("level", LEVELS)
def test_a_product_in_a_branch_is_scaled_where_that_helps(level: str) -> None:
    program = captured(Scaled().eval(), X, frontend="script")
    after, log = seen_on(program, X, level=level)
    assert "linear(x) -> 2^" in " ".join(r.rule for r in log.rewrites)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]
    unaware = cast_half.with_options(dtype="float16", level=level)(program)
    assert not outputs_of(unaware, X)[0].isfinite().all(), "the test sees an overflow in a branch"


class Grows(nn.Module):
    """Small at first; after some rounds nothing fits."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear(8.0)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n)):
            x = self.a(x).relu()
        return x * 1e-9


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rounds, fits", [(1, True), (3, True), (6, False)])
def test_a_value_that_grows_over_the_rounds_is_judged_by_all_of_them(rounds: int, fits: bool, level: str) -> None:
    n = torch.tensor(rounds)
    program = captured(Grows().eval(), X, n, frontend="script")
    after, log = seen_on(program, X, n, level=level)
    assert relative_error(outputs_of(program, X, n), outputs_of(after, X, n)) <= WITHIN["float16"]
    (relu,) = (node for node in after.all_calls if short_name(node.target) == "relu")
    assert (facts.dtype(relu) is torch.float16) == fits
    assert {r.reason for r in log.refusals}.isdisjoint({reasons.OVERFLOWS, reasons.READS_UNFIT}) == fits


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", LEVELS)
def test_a_loop_without_rounds_stays_float(level: str, dtype: str) -> None:
    n = torch.tensor(0)
    program = captured(Grows().eval(), X, n, frontend="script")
    after, log = seen_on(program, X, n, dtype=dtype, level=level)
    assert not any(in_halves(after)[f"loop1_{name}"] for name in ("linear", "relu"))
    assert {r.site for r in log.refusals if r.reason == reasons.NOT_RUN} >= {"cast_half@loop1_linear"}
    assert not any(r.expected for r in log.refusals if r.reason == reasons.NOT_RUN), "the report says so"


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear(2.0)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        for _ in range(int(n)):
            x = self.a(x)
            if bool(x.sum() > 1000):
                x = self.b(x)
            else:
                x = self.c(x)
        return x


@pytest.mark.parametrize("dtype", HALVES)
def test_only_the_branch_that_was_not_run_stays_float(dtype: str) -> None:
    n = torch.tensor(3)
    program = captured(Nested().eval(), X, n, frontend="script")
    after, log = seen_on(program, X, n, dtype=dtype)
    found = in_halves(after)
    assert found["loop1_linear"] and found["loop1_if2_else_linear"] and not found["loop1_if2_then_linear"]
    assert [r.site for r in log.refusals if r.reason == reasons.NOT_RUN] == ["cast_half@loop1_if2_then_linear"]
    many = torch.tensor(9)  # by then the sum has grown
    after, log = seen_on(program, X, many, dtype=dtype)
    assert in_halves(after)["loop1_if2_then_linear"] and reasons.NOT_RUN not in {r.reason for r in log.refusals}


class Small(nn.Module):
    """The operand of the branch is too small for float16, and divides in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor, d: Tensor) -> Tensor:
        y = self.a(x)
        if bool(y.sum() > 0):
            y = y / self.a(d)
        return y


@pytest.mark.parametrize("level", LEVELS)
def test_operands_of_a_branch_are_judged_by_what_was_seen_of_them(level: str) -> None:
    d = torch.tensor([[1.0, 2.0, 3.0, 1e-9]])
    program = captured(Small().eval(), X, d, frontend="script")
    after, log = seen_on(program, X, d, level=level)
    assert {reasons.LOSES, reasons.READS_UNFIT} & {r.reason for r in log.refusals}
    assert relative_error(outputs_of(program, X, d), outputs_of(after, X, d)) <= WITHIN["float16"]


class Masks(nn.Module):
    """A branch makes a mask that a softmax outside of it adds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores, added = self.a(x), mask * 0.0
        if bool(mask.sum() > 0):
            added = (1.0 - mask) * -1e9
        return self.a((scores + added).softmax(-1))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("is_observed", [False, True])
def test_a_mask_out_of_a_branch_masks_whatever_was_seen(is_observed: bool, dtype: str, level: str) -> None:
    keep = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 1.0]])
    program = captured(Masks().eval(), X, keep, frontend="script")
    half = cast_half.with_options(dtype=dtype, level=level)
    after = seen_on(program, X, keep * 0, dtype=dtype, level=level)[0] if is_observed else half(program)
    assert relative_error(outputs_of(program, X, keep), outputs_of(after, X, keep)) <= WITHIN[dtype]


def test_the_report_says_what_was_not_run() -> None:
    model = Branch(2.0).eval()
    fast = optimize(model, "cast_half:dtype=float16:on_slower=keep", example_inputs=X, frontend="script", engine="aten")
    assert reasons.NOT_RUN in " ".join(str(fast.report).split())
    both = optimize(
        model, "cast_half:dtype=float16:on_slower=keep", example_inputs=X, calibration_data=[X, -X], frontend="script"
    )
    assert reasons.NOT_RUN not in " ".join(str(both.report).split()), "calibration data that takes both branches"
