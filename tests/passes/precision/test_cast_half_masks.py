"""Masks and other large numbers in half precision: they stay finite, clamped where they must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir.dialect import short_name
from passes.analysis import value_ranges
from tests.check import captured, ops, outputs_of, relative_error, rewritten
from tests.passes.precision.half_casts import (
    HALVES,
    LEVELS,
    LOWEST,
    WITHIN,
    Model,
    X,
    cast_half,
    check_cast,
    computes_in,
    reasons,
    seen_on,
    source,
)

# -- masks and other large numbers -------------------------------------------------------------------------------------


def _attention(score: Callable[[Tensor, Tensor], Tensor]) -> Callable:
    return lambda m, x, keep: score(m.l(x), keep).softmax(-1) @ m.l(x).t()


MASKS: dict[str, Callable[[float], Callable]] = {
    "masked_fill": lambda low: _attention(lambda s, keep: s.masked_fill(keep == 0, low)),
    "where a scalar": lambda low: _attention(lambda s, keep: torch.where(keep > 0, s, low)),
    "where a tensor": lambda low: _attention(lambda s, keep: torch.where(keep > 0, s, torch.full((), low))),
    "added": lambda low: _attention(lambda s, keep: s + (1.0 - keep) * low),
    "added, reshaped": lambda low: _attention(lambda s, keep: s + ((1.0 - keep) * low)[None].squeeze(0)),
    "scaled dot product": lambda low: (
        lambda m, x, keep: F.scaled_dot_product_attention(
            m.l(x)[None], x[None], x[None], attn_mask=((1.0 - keep) * low)[:, :3]
        )[:, ::2]
    ),  # where everything is masked, the kernel's float sums distinguish -65504 + 1 from -65504
    "clamped": lambda low: _attention(lambda s, keep: (s * keep).clamp(min=low, max=-low)),
}

# The second row masks everything: attention is then uniform, and NaN where the mask became an infinity.
KEEP = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("low", [-1e9, LOWEST], ids=["-1e9", "finfo.min"])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_stay_finite(mask: str, low: float, dtype: str, level: str) -> None:
    """apex#1052, fairseq#3575: a mask that overflows raises, or makes NaN of a row that is masked as a whole."""
    model = Model(MASKS[mask](low), l=nn.Linear(4, 4))
    _, log = check_cast(model, X, KEEP, dtype=dtype, level=level)
    if abs(low) > torch.finfo(HALVES[dtype]).max:
        assert reasons.IS_WIDE in [r.reason for r in log.refusals], "that a number was out of range is said"
    else:
        assert reasons.IS_WIDE not in [r.reason for r in log.refusals]


def test_two_masks_may_be_added() -> None:
    """Each one clamped by itself, their sum would overflow again."""
    twice = _attention(lambda s, keep: s.masked_fill(keep == 0, -1e9) + (1.0 - keep) * -1e9)
    check_cast(Model(twice, l=nn.Linear(4, 4)), X, KEEP, dtype="float16")


@pytest.mark.parametrize("dtype", HALVES)
def test_a_constant_mask_is_clamped_ahead_of_time(dtype: str) -> None:
    mask = torch.tensor([0.0, -1e9, LOWEST, float("-inf"), 1.0])
    model = Model(lambda m, x: (m.l(x) + m.mask).softmax(-1), l=nn.Linear(4, 5), mask=mask)
    after, _ = check_cast(model, X, dtype=dtype)
    clamped = after.constants["mask@cast_half"]
    assert clamped.isinf().tolist() == [False, False, False, True, False], "only the user's infinity is infinite"


def test_what_may_be_out_of_range_stays_float_until_something_reads_it_in_half() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = (m.l(x) + 1e9 * x).clamp(-3.0, 3.0).reshape(4, 3)
        return m.k(y)

    after, _ = check_cast(Model(function, l=nn.Linear(4, 4), k=nn.Linear(3, 2)), X, dtype="float16")
    assert ops(after) == ["to", "linear", "to", "mul", "add", "clamp", "reshape", "clamp", "to", "linear", "to"]


def test_infinite_masks_stay_half() -> None:
    model = Model(lambda m, x: m.l(x).masked_fill(x > 9, float("-inf")), l=nn.Linear(4, 4))
    after, log = check_cast(model, X, dtype="float16")
    assert computes_in(after)["masked_fill"] is torch.float16 and not any(r.reason == reasons.IS_WIDE for r in log.refusals)


# -- sites and teeth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["masked_fill", "added", "where a tensor"])
def test_an_overflowing_mask_is_noticed(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_ranges, "numbers_in", lambda node: [])
    with pytest.raises((AssertionError, RuntimeError), match=r"relative error inf|without overflow"):
        check_cast(Model(MASKS[mask](LOWEST), l=nn.Linear(4, 4)), X, KEEP, dtype="float16")


def test_a_wide_result_that_is_not_clamped_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(source.Caster):
        def _new_cast(self, node, dtype):
            self.wide.clear()
            return super()._new_cast(node, dtype)

    monkeypatch.setattr(source, "Caster", Forgetful)
    with pytest.raises(AssertionError, match="relative error inf"):
        check_cast(Model(MASKS["added"](LOWEST), l=nn.Linear(4, 4)), X, KEEP, dtype="float16", level="O3")


# -- small numbers -----------------------------------------------------------------------------------------------------


def test_clamped_constants_are_reported() -> None:
    model = Model(lambda m, x: m.l(x) + m.mask, l=nn.Linear(4, 4), mask=torch.tensor([0.0, -1e9, 1.0, 2.0]))
    _, log = rewritten(cast_half.with_options(dtype="float16"), captured(model.eval(), X), X)
    assert [r.reason for r in log.refusals] == [reasons.CLAMPED]
    _, log = rewritten(cast_half, captured(model, X), X)
    assert not log.refusals


def test_a_mask_that_the_model_casts_is_clamped() -> None:
    def attend(m: Model, x: Tensor, keep: Tensor) -> Tensor:
        q = m.l(x)[None]
        return F.scaled_dot_product_attention(q, m.l(q), q, attn_mask=keep.to(torch.float32)[None])

    mask = torch.zeros(3, 3, dtype=torch.int64)
    mask[1] = -(10**9)
    model = Model(attend, l=nn.Linear(4, 4)).eval()
    program = captured(model, X, mask)
    after, _ = rewritten(cast_half.with_options(dtype="float16"), program, X, mask)
    assert ops(after).count("clamp") == 1 and outputs_of(after, X, mask)[0].abs().min() > 0, "a row of zeros was all -inf"


# -- what was seen on data ---------------------------------------------------------------------------------------------

MASKED: dict[str, Callable] = {
    "scores, by hand": lambda m, x, mask: (m.l(x) @ m.l(x).t() + mask).softmax(-1) @ m.l(x),
    "moved first": lambda m, x, mask: (m.l(x) @ m.l(x).t() + mask[None].expand(1, 3, 3).squeeze(0)).softmax(-1) @ m.l(x),
    "where": lambda m, x, mask: torch.where(x[:, :3] < 9, mask, m.l(x)[:, :3]).softmax(-1) @ m.l(x),
    "fused": lambda m, x, mask: F.scaled_dot_product_attention(m.l(x)[None], m.l(x)[None], m.l(x)[None], attn_mask=mask[None]),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("low", [-1e9, LOWEST], ids=["-1e9", "finfo.min"])
@pytest.mark.parametrize("case", MASKED)
@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
def test_a_mask_among_the_inputs_gives_no_nan(case: str, low: float, dtype: str, level: str, seen: bool) -> None:
    """Also where the example masked nothing, and a call masks a whole row."""
    nothing, a_row = torch.zeros(3, 3), torch.zeros(3, 3)
    a_row[1] = low
    model = Model(MASKED[case], l=nn.Linear(4, 4)).eval()
    program = captured(model, X, nothing)
    after, log = seen_on(program, X, a_row if seen else nothing, dtype=dtype, level=level)
    (got,) = outputs_of(after, X, a_row)
    (expected,) = outputs_of(program, X, a_row)
    assert got.isfinite().all()
    rows = [0, 2]  # the masked one is uniform in float32 only because -1e9 swallows its scores
    assert relative_error([expected[..., rows, :]], [got[..., rows, :]]) <= WITHIN[dtype]
    clamps = [n for n in after.calls if short_name(n.target) == "clamp"]
    said = {reasons.VALUE_CLAMPED, reasons.OVERFLOWS, reasons.IS_WIDE} & {r.reason for r in log.refusals}
    assert said or not clamps


@pytest.mark.parametrize("low", [-1e9, LOWEST])
def test_a_mask_among_the_inputs_is_clamped_where_attention_reads_it(low: float) -> None:
    def attend(m: Model, x: Tensor, mask: Tensor) -> Tensor:
        q = m.l(x)[None]
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask.reshape(1, 3, 3).contiguous())[:, ::2]

    # Where everything is masked, the kernel's float sums distinguish -65504 + 1 from -65504: finite, and no number to compare.
    mask = torch.tensor([[0.0, low, low], [low, low, low], [0.0, 0.0, 0.0]])
    model = Model(attend, l=nn.Linear(4, 4)).eval()
    program = captured(model, X, mask)
    after, _ = seen_on(program, X, mask)
    assert computes_in(after)["scaled_dot_product_attention"] is torch.float16
    assert relative_error(outputs_of(program, X, mask), outputs_of(after, X, mask)) <= WITHIN["float16"]
