"""Timing two models side by side: the order of calls, the medians, the ratio."""

import time

import torch

from passes.tune.timing import WARM_UP, Comparison, compare_latency


def test_models_are_called_in_turn_and_neither_always_first():
    calls: list[str] = []
    compare_latency(lambda: calls.append("a"), lambda: calls.append("b"), seconds=0, least_rounds=4)
    assert "".join(calls) == "a" * WARM_UP + "b" * WARM_UP + "ab" + "ba" + "ab" + "ba"


def test_the_slower_model_is_measured_as_slower():
    comparison = compare_latency(lambda: time.sleep(0.02), lambda: time.sleep(0.002), seconds=0, least_rounds=5)
    assert comparison.rounds == 5
    assert 0.02 <= comparison.before < 0.2
    assert comparison.ratio > 2


def test_rounds_are_bounded_by_time_and_number():
    assert compare_latency(lambda: None, lambda: None, seconds=60, most_rounds=7).rounds == 7
    started = time.perf_counter()
    compare_latency(lambda: time.sleep(0.01), lambda: time.sleep(0.01), seconds=0.2)
    assert time.perf_counter() - started < 5


def test_arguments_are_handed_on_and_no_gradients_are_kept():
    seen = []

    def model(x: torch.Tensor, scale: int) -> None:
        seen.append((scale, torch.is_grad_enabled()))

    compare_latency(model, model, [torch.zeros(1)], {"scale": 3}, seconds=0, least_rounds=1)
    assert set(seen) == {(3, False)}
    assert torch.is_grad_enabled()


def test_text():
    assert str(Comparison(0.0512, 0.0080, 40)) == "51.2 → 8 ms, 6.40x"
