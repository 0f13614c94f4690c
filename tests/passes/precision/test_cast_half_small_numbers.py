"""Small numbers in half precision: epsilons and bounds that must still guard, constants that do not fit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from passes import CATALOGUE
from passes.precision import hazards
from tests.check import captured, ops, outputs_of, relative_error, rewritten
from tests.passes.precision.half_casts import HALVES, LEVELS, WITHIN, Model, X, cast_half, check_cast, computes_in, reasons

GUARDED: dict[str, Callable] = {
    "norm plus epsilon": lambda m, x: m.l(m.l(x) / (m.l(x).norm(dim=-1, keepdim=True) + 1e-12)),
    "clamped norm": lambda m, x: m.l(m.l(x) / m.l(x).norm(dim=-1, keepdim=True).clamp_min(1e-12).expand(3, 4)),
    "normalize": lambda m, x: m.l(F.normalize(m.l(x), eps=1e-12)),
    "root": lambda m, x: m.l(m.l(x) / (m.l(x).var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()),
    "inverse root": lambda m, x: m.l(m.l(x) * (m.l(x).var(-1, keepdim=True, unbiased=False) + 1e-12).rsqrt()),
    "constant": lambda m, x: m.l(m.l(x) / (m.l(x).norm(dim=-1, keepdim=True) + m.eps)),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", GUARDED)
def test_epsilons_below_half_precision_still_guard(case: str, level: str) -> None:
    """A row of zeros: float16 turns 1e-12 into 0, and 0 / 0 into NaN."""
    linear = nn.Linear(4, 4, bias=False)
    model = Model(GUARDED[case], l=linear, eps=torch.tensor(1e-12)).eval()
    x = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)])
    _, log = check_cast(model, x, dtype="float16", level=level)
    assert reasons.IS_TINY in [r.reason for r in log.refusals]
    _, log = check_cast(model, x, dtype="bfloat16", level=level)
    assert reasons.IS_TINY not in [r.reason for r in log.refusals], "bfloat16 has the exponents of float32"


def test_an_epsilon_that_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(GUARDED["norm plus epsilon"], l=nn.Linear(4, 4, bias=False))
    x = torch.cat([torch.zeros(1, 4), torch.randn(2, 4)])
    monkeypatch.setattr(hazards, "numbers_of", lambda node, values: [])
    with pytest.raises(AssertionError, match="relative error inf"):
        check_cast(model, x, dtype="float16", level="O3")


CONSTANTS: dict[str, tuple[Callable, float]] = {
    "tiny weights": (lambda m, x: F.linear(x, m.w) * 1e8, 1e-8),
    "huge weights": (lambda m, x: F.linear(x, m.w) * 1e-6, 1e6),
    "a huge factor": (lambda m, x: m.l(m.l(x) * m.w[:3] * 1e-6), 1e6),
    "a small divisor": (lambda m, x: m.l(m.l(x) / m.w[:3].abs().clamp(min=1e-9) * 1e-8), 1e-8),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("case", CONSTANTS)
def test_constants_that_do_not_fit_keep_their_op_in_float(case: str, level: str) -> None:
    function, scale = CONSTANTS[case]
    model = Model(function, l=nn.Linear(4, 4), w=torch.randn(4, 4) * scale)
    program = CATALOGUE["fold_constants"](captured(model.eval(), X))
    after, log = rewritten(cast_half.with_options(dtype="float16", level=level), program, X)
    assert relative_error(outputs_of(program, X), outputs_of(after, X)) <= WITHIN["float16"]
    assert {reasons.CONSTANT_LOST, reasons.IS_WIDE} & {r.reason for r in log.refusals}


def test_small_biases_keep_nothing_in_float() -> None:
    linear, norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
    with torch.no_grad():
        linear.bias.mul_(1e-8), norm.running_mean.add_(1e-8)
    model = Model(lambda m, x: m.l(m.n(m.l(x))), l=linear, n=norm)
    after, _ = check_cast(model, X, dtype="float16")
    assert ops(after) == ["to", "linear", "batch_norm", "linear", "to"]


GUARDED_ONES: dict[str, Callable] = {
    "cross entropy": lambda m, x: m.l(torch.log(1 - (m.l(x) * 20).sigmoid().clamp(1e-7, 1 - 1e-7))),
    "atanh": lambda m, x: m.l(torch.atanh((m.l(x) * 9).tanh().clamp(-1 + 1e-4, 1 - 1e-4))),
    "odds": lambda m, x: m.l((lambda p: p / (1 - p))((m.l(x) * 9).sigmoid().clamp(1e-4, 1 - 1e-4)).log()),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("case", GUARDED_ONES)
def test_bounds_near_one_still_guard(case: str, level: str, dtype: str) -> None:
    """1 - 1e-7 is 1 in half precision, and log(1 - 1) is not finite."""
    model = Model(GUARDED_ONES[case], l=nn.Linear(4, 4)).eval()
    x = torch.cat([X, 8 * X])
    program = captured(model, x)
    after, _ = rewritten(cast_half.with_options(dtype=dtype, level=level), program, x)
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) <= 10 * WITHIN[dtype]


def test_a_single_small_number_of_a_layer_keeps_nothing_in_float() -> None:
    linear = nn.Linear(4, 1)
    nn.init.constant_(linear.bias, 3e-5)
    after, _ = check_cast(Model(lambda m, x: m.l(x), l=linear), X, dtype="float16")
    assert computes_in(after)["linear"] is torch.float16
