"""Comparing outputs with a reference."""

from __future__ import annotations

import math

import pytest
import torch

from ir_tools.rewrite.numeric_effects import NUMERIC_EFFECTS
from ir_tools.verify.numerics import PERFECT, SMALLEST_GOLDEN_SQNR_DB, SMALLEST_SQNR_DB, Comparison, compare, smallest_sqnr

NAN, INF = float("nan"), float("inf")


def test_equal_tensors_have_no_noise() -> None:
    x = torch.randn(10)
    assert compare([x, x.int()], [x.clone(), x.int()]) == PERFECT and PERFECT.equal
    assert compare([torch.empty(0)], [torch.empty(0)]).equal


@pytest.mark.parametrize("noise, decibel", [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0), (10.0, -20.0)])
def test_sqnr_is_the_power_of_the_signal_over_that_of_the_noise(noise: float, decibel: float) -> None:
    """Signal 1 everywhere, error `noise` everywhere: SQNR = -20 log10(noise)."""
    reference = torch.ones(8, dtype=torch.float64)
    result = compare([reference], [reference + noise])
    assert result.sqnr_db == pytest.approx(decibel, abs=1e-9)
    assert result.max_abs_error == pytest.approx(noise, abs=1e-15) and not result.problem and not result.equal


def test_six_decibels_are_one_bit() -> None:
    reference = torch.ones(8, dtype=torch.float64)
    coarse, fine = (compare([reference], [reference + 2.0**-bits]).sqnr_db for bits in (8, 9))
    assert fine - coarse == pytest.approx(6.0206, abs=1e-3)


def test_the_worst_output_counts() -> None:
    a, b = torch.ones(4), torch.ones(4)
    result = compare([a, b], [a + 0.5, b + 0.01])
    assert result.sqnr_db == pytest.approx(20 * math.log10(2), abs=1e-3) and result.max_abs_error == 0.5


def test_one_unit_in_the_last_place_is_seen() -> None:
    x = torch.randn(1000)
    y = x.clone()
    y[7] = torch.nextafter(y[7], torch.tensor(INF))
    result = compare([x], [y])
    assert not result.equal and 0 < result.max_abs_error < 1e-6


@pytest.mark.parametrize(
    "expected, value, problem",
    [
        (torch.ones(3), torch.ones(4), "output 0 has shape [4] instead of [3]"),
        (torch.ones(3), torch.ones(3, 1), "output 0 has shape [3, 1] instead of [3]"),
        (torch.ones(3), torch.ones(3).double(), "output 0 has dtype torch.float64 instead of torch.float32"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), "output 0 holds NaN or Inf where the reference is finite"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, INF]), "output 0 holds NaN or Inf where the reference is finite"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "output 0 differs where the reference is NaN or Inf"),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF]), "output 0 differs where the reference is NaN or Inf"),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, INF]), "output 0 differs where the reference is NaN or Inf"),
    ],
)
def test_hard_failures(expected: torch.Tensor, value: torch.Tensor, problem: str) -> None:
    result = compare([expected], [value])
    assert result == Comparison(math.inf, -math.inf, problem) and not result.equal


def test_another_number_of_outputs_is_a_failure() -> None:
    assert compare([torch.ones(1)], []).problem == "0 outputs instead of 1"


def test_nan_and_inf_where_the_reference_has_them_do_not_count() -> None:
    reference = torch.tensor([1.0, NAN, INF, -INF])
    assert compare([reference], [reference.clone()]).equal
    result = compare([reference], [torch.tensor([1.5, NAN, INF, -INF])])
    assert not result.problem and result.max_abs_error == 0.5


def test_after_a_stabilising_pass_nan_and_inf_of_the_reference_are_left_out() -> None:
    reference = torch.tensor([1.0, NAN, INF, -INF])
    stable = torch.tensor([1.5, 2.0, 3.0, NAN])
    assert compare([reference], [stable]).problem == "output 0 differs where the reference is NaN or Inf"
    result = compare([reference], [stable], where_finite=True)
    assert not result.problem and result.max_abs_error == 0.5
    assert compare([reference], [torch.tensor([1.0, 2.0, 3.0, 4.0])], where_finite=True).equal


def test_what_is_finite_in_the_reference_is_compared_all_the_same() -> None:
    result = compare([torch.tensor([1.0, NAN])], [torch.tensor([INF, 1.0])], where_finite=True)
    assert result.problem == "output 0 holds NaN or Inf where the reference is finite"


def test_a_reference_without_a_finite_element_compares_nothing() -> None:
    nothing = torch.tensor([NAN, INF])
    problem = "output 0 cannot be compared: the reference is NaN or Inf throughout"
    assert compare([nothing], [torch.ones(2)], where_finite=True).problem == problem
    assert compare([nothing], [nothing.clone()], where_finite=True).equal


def test_noise_on_silence_has_no_ratio() -> None:
    result = compare([torch.zeros(3)], [torch.tensor([0.0, 1e-9, 0.0])])
    assert result.sqnr_db == -math.inf and result.max_abs_error == pytest.approx(1e-9)


def test_integers_booleans_and_complex_numbers_are_compared() -> None:
    assert compare([torch.tensor([1, 2])], [torch.tensor([1, 3])]).max_abs_error == 1
    assert compare([torch.tensor([True, False])], [torch.tensor([True, True])]).max_abs_error == 1
    z = torch.tensor([1 + 2j, 3 - 1j])
    assert compare([z], [z.clone()]).equal
    assert compare([z], [z + 1j]).max_abs_error == 1


def test_large_values_do_not_overflow_the_ratio() -> None:
    reference = torch.full((4,), 1e30)
    assert compare([reference], [reference * 1.1]).sqnr_db == pytest.approx(20, abs=0.1)


def test_worse_is_the_worse_of_each_figure() -> None:
    a, b = Comparison(0.1, 40.0), Comparison(0.2, 60.0, "broken")
    assert a.worse(b) == b.worse(a) == Comparison(0.2, 40.0, "broken")


def test_the_table_grows_stricter_with_the_dtype_and_milder_with_the_effect() -> None:
    row = SMALLEST_SQNR_DB["rounds"]
    assert row[torch.float64] > row[torch.float32] > row[torch.float16] > row[torch.bfloat16] > 0
    for dtype in (torch.float16, torch.bfloat16):
        assert row[dtype] > SMALLEST_SQNR_DB["lowers_precision"][dtype] > SMALLEST_SQNR_DB["quantizes"][dtype] > 0
        assert SMALLEST_GOLDEN_SQNR_DB[dtype] > SMALLEST_SQNR_DB["lowers_precision"][dtype]
    golden = SMALLEST_GOLDEN_SQNR_DB
    assert golden[torch.float64] > golden[torch.float32] > golden[torch.float16] > golden[torch.bfloat16]


def test_the_rows_are_effects() -> None:
    assert set(NUMERIC_EFFECTS) - SMALLEST_SQNR_DB.keys() == {"non_finite_may_become_finite"}
    assert SMALLEST_SQNR_DB.keys() <= set(NUMERIC_EFFECTS)


@pytest.mark.parametrize(
    "effects, dtypes, expected",
    [
        ({"rounds"}, {torch.float64}, 200.0),
        ({"rounds"}, {torch.float64, torch.float32}, 80.0),
        ({"rounds", "non_finite_may_become_finite"}, {torch.float32}, 80.0),
        ({"rounds", "lowers_precision"}, {torch.float32}, 80.0),  # nothing is half: nothing is allowed for it
        ({"lowers_precision"}, {torch.float64, torch.float32}, 80.0),
        ({"rounds", "lowers_precision"}, {torch.float32, torch.float16}, 20.0),
        ({"rounds", "lowers_precision"}, {torch.float32, torch.bfloat16, torch.float16}, 8.0),
        ({"rounds", "lowers_precision", "quantizes"}, {torch.float32, torch.bfloat16}, 6.5),
        ((), {torch.float32}, math.inf),
        ({"non_finite_may_become_finite"}, {torch.float32}, math.inf),
    ],
)
def test_the_least_figure_of_the_cells_that_apply_counts(effects, dtypes, expected) -> None:
    assert smallest_sqnr(effects, dtypes) == expected
