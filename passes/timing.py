"""How fast two models are, side by side: rounds that call both in turn, medians, and their ratio.

Machines are noisy in ways that last for seconds. Two models timed one after the other meet different machines; called
in turn they share every slow moment, so that the ratio is worth more than either time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

WARM_UP = 3
"""Calls before timing: kernels are chosen, memory is allocated, and TorchScript specialises during the first ones."""


@dataclass(frozen=True)
class Comparison:
    """Median seconds per call of the two models over `rounds` rounds."""

    before: float
    after: float
    rounds: int

    @property
    def ratio(self) -> float:
        """How many times faster the second model is."""
        return self.before / self.after

    def __str__(self) -> str:
        return f"{_milliseconds(self.before)} → {_milliseconds(self.after)} ms, {self.ratio:.2f}x"


def compare_latency(
    before: Callable[..., Any],
    after: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    seconds: float = 3.0,
    least_rounds: int = 5,
    most_rounds: int = 200,
) -> Comparison:
    """Call both models in turn for about `seconds`, without gradients, and take the median time of each.

    At least `least_rounds` rounds are run, however slow the models are.
    """
    kwargs = kwargs or {}
    times: dict[int, list[float]] = {0: [], 1: []}
    models = (before, after)
    with torch.no_grad():
        for model in models:
            for _ in range(WARM_UP):
                model(*args, **kwargs)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least_rounds or (time.perf_counter() < end and rounds < most_rounds):
            for i in (0, 1) if rounds % 2 == 0 else (1, 0):  # neither always finds the other's data in the caches
                start = time.perf_counter()
                models[i](*args, **kwargs)
                times[i].append(time.perf_counter() - start)
            rounds += 1
    return Comparison(statistics.median(times[0]), statistics.median(times[1]), rounds)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
