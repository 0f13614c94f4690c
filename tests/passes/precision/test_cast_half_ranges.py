"""What ranges observed on data change: values that do not fit stay float, products are rescaled."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ir_tools.ir import facts
from ir_tools.ir.dialect import short_name
from ir_tools.rewrite import Artifacts, RewriteLog
from passes.precision.op_table import MATRIX
from tests.check import captured, observe, outputs_of, relative_error
from tests.passes.precision.half_casts import LEVELS, WITHIN, Model, X, cast_half, computes_in, reasons, seen_on

# -- small numbers -----------------------------------------------------------------------------------------------------


def test_a_small_difference_that_is_divided_by_is_float_where_data_shows_it() -> None:
    model = Model(lambda m, x: m.l(torch.log(1 - m.l(x * 5).sigmoid())), l=nn.Linear(4, 4)).eval()
    x = X * 12
    program = captured(model, x)
    after, log = seen_on(program, x, dtype="bfloat16")
    assert computes_in(after)["sigmoid"] is torch.float32 and reasons.CANCELS in [r.reason for r in log.refusals]
    assert cast_half(program) is not program and computes_in(cast_half(program))["sigmoid"] is torch.bfloat16


def test_a_part_that_does_not_fit_keeps_what_it_is_a_part_of_in_float() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        linear.weight[:2] *= 1e-8
    model = Model(lambda m, x: (lambda u, v: u * 1e8 + v)(*m.l(x).chunk(2, -1)), l=linear).eval()
    program = captured(model, X)
    after, _ = seen_on(program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]


# -- what was seen on data ---------------------------------------------------------------------------------------------

OUT_OF_RANGE: dict[str, tuple[Callable, str]] = {
    "a product": (lambda m, x: m.l(m.l(x * 200) * 2000) * 1e-6, "OVERFLOWS"),
    "an exponential": (lambda m, x: m.l((m.l(x).relu() + 15).exp()) * 1e-6, "OVERFLOWS"),
    "a quotient": (lambda m, x: m.l(m.l(x) / (m.l(x).relu() * 1e-3 + 1e-4) * 10) * 1e-3, "OVERFLOWS"),
    "small values": (lambda m, x: m.l(m.l(x) * 0.001 * 0.001 * 0.01) * 1e8, "LOSES"),
    "a small divisor": (lambda m, x: m.l(x) / ((m.l(x) * 0.001).relu() * 0.001 * 0.01 + 0.0).clamp(min=1e-4), ""),
}


@pytest.mark.parametrize("level", ["O1", "O2", "O3"])
@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_values_that_do_not_fit_stay_float(case: str, level: str) -> None:
    function, why = OUT_OF_RANGE[case]
    model = Model(function, l=nn.Linear(4, 4, bias=False)).eval()
    program = captured(model, X)
    after, log = seen_on(program, X, level=level)
    expected, got = outputs_of(program, X), outputs_of(after, X)
    assert got[0].isfinite().all() and relative_error(expected, got) <= 2e-2
    said = {r.reason for r in log.refusals}
    assert getattr(reasons, why, None) in said or not why
    after, log = seen_on(program, X, dtype="bfloat16", level=level)
    assert not {reasons.OVERFLOWS, reasons.LOSES, reasons.READS_UNFIT} & {r.reason for r in log.refusals}


@pytest.mark.parametrize("case", ["a product", "an exponential", "small values"])
def test_without_data_the_same_values_are_lost(case: str) -> None:
    """What the ranges are for: a cast without them is not finite, or far off."""
    program = captured(Model(OUT_OF_RANGE[case][0], l=nn.Linear(4, 4, bias=False)).eval(), X)
    got = outputs_of(cast_half.with_options(dtype="float16")(program), X)
    assert not got[0].isfinite().all() or relative_error(outputs_of(program, X), got) > 2e-2


RESCALED: dict[str, Callable] = {
    "a product that is too large": lambda m, x: (x * 300) @ (x * 300).t() * 1e-6,
    "a layer of too large values": lambda m, x: m.b((x * 300) * 300) * 1e-5,
    "a layer of too small values": lambda m, x: m.l(x * 1e-8) * 1e8,
    "a convolution": lambda m, x: m.c(x[None] * 1e6) * 1e-6,
    "a layer and its relu": lambda m, x: fused(x * 1e5, m.b.weight, m.b.bias, None, "relu", []) * 1e-5,
}
fused = torch.ops.torch_passes.linear_act


def with_large_bias() -> nn.Linear:
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.bias.mul_(1e5)
    return linear


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", RESCALED)
def test_products_out_of_range_are_scaled_by_a_power_of_two(case: str, level: str) -> None:
    parts = {"l": nn.Linear(4, 4, bias=False), "b": with_large_bias(), "c": nn.Conv1d(3, 2, 3)}
    program = captured(Model(RESCALED[case], **parts).eval(), X)
    after, log = seen_on(program, X, level=level)
    (rewrite,) = [r for r in log.rewrites if "->" in r.rule]
    products = [n for n in after.calls if short_name(n.target) in MATRIX]
    assert [facts.dtype(n) for n in products] == [torch.float16], rewrite.rule
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]
    left_alone, log = cast_half.with_options(dtype="float16", level=level), RewriteLog.skipping({rewrite.site})
    seen = Artifacts(observe(program, [[X]]))
    products = [n for n in left_alone(program, log=log, artifacts=seen).calls if short_name(n.target) in MATRIX]
    assert [facts.dtype(n) for n in products] == [torch.float32]


def test_a_product_that_the_user_keeps_in_float_is_not_scaled() -> None:
    program = captured(Model(RESCALED["a layer of too large values"], b=with_large_bias()).eval(), X)
    log, seen = RewriteLog(), Artifacts(observe(program, [[X]]))
    after = cast_half.with_options(dtype="float16", keep_float=["linear"])(program, log=log, artifacts=seen)
    assert after is program and not log.rewrites


def test_a_product_that_cannot_be_scaled_stays_float() -> None:
    """A sigmoid does not scale along, nor does what is multiplied with itself."""
    itself = captured(Model(lambda m, x: (lambda y: y @ y.t() @ y @ y.t())(x * 300) * 1e-9).eval(), X)
    act = lambda m, x: fused(x * 1e5, m.b.weight, m.b.bias, None, "sigmoid", [])  # noqa: E731
    for program in (itself, captured(Model(act, b=nn.Linear(4, 4)).eval(), X)):
        after, log = seen_on(program, X)
        assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]


def test_a_scale_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rescaling = importlib.import_module("passes.precision.rescaling")
    monkeypatch.setattr(rescaling, "LINEAR_IN", {"linear": ("input", "")})  # forgets the bias
    program = captured(Model(RESCALED["a layer of too large values"], b=with_large_bias()).eval(), X)
    after, _ = seen_on(program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) > 0.1
