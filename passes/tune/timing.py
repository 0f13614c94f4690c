"""Timing calls side by side, in interleaved rounds, and the timer that tuning and the speed comparison use.

Noise of a machine lasts for seconds. Two models timed one after the other run under different conditions; called in turn they
share every slow moment, so that their ratio is more reliable than either time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch

WARM_UP = 3
"""Calls before timing: torch selects kernels, allocates memory, and TorchScript specialises during the first ones."""


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
        return f"{milliseconds(self.before)} → {milliseconds(self.after)} ms, {self.ratio:.2f}x"


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
    calls = {"before": lambda: before(*args, **kwargs), "after": lambda: after(*args, **kwargs)}
    times = interleaved_seconds(calls, seconds=seconds, least_rounds=least_rounds, most_rounds=most_rounds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Comparison(medians["before"], medians["after"], len(times["before"]))


def interleaved_seconds(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 3.0,
    least_rounds: int = 5,
    most_rounds: int = 200,
    warm_up: int = WARM_UP,
    ready: Callable[[str], Any] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call, by name, in rounds that make every call once; every other round in reverse order.

    `ready` is called with the name before each call, and is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for name, call in calls.items():
            for _ in range(warm_up):
                ready(name)
                call()
        end = clock() + seconds
        rounds = 0
        while rounds < least_rounds or (clock() < end and rounds < most_rounds):
            names = list(calls) if rounds % 2 == 0 else list(calls)[::-1]  # none always finds another's data in the caches
            for name in names:
                ready(name)
                start = clock()
                calls[name]()
                times[name].append(clock() - start)
            rounds += 1
    return times


class Timer(Protocol):
    """Seconds of each call, by name: `interleaved_seconds`, or a replacement of it."""

    def __call__(
        self,
        calls: Mapping[str, Callable[[], Any]],
        *,
        seconds: float,
        least_rounds: int,
        most_rounds: int,
        warm_up: int = WARM_UP,
        ready: Callable[[str], Any] = ...,
    ) -> dict[str, list[float]]: ...


_timer: ContextVar[Timer] = ContextVar("timer", default=interleaved_seconds)


def current_timer() -> Timer:
    """The timer of tuning and of the speed comparison."""
    return _timer.get()


@contextmanager
def using_timer(timer: Timer) -> Iterator[None]:
    """Let tuning and the speed comparison time calls with `timer`: one that returns given figures, for example."""
    token = _timer.set(timer)
    try:
        yield
    finally:
        _timer.reset(token)


def milliseconds(seconds: float) -> str:
    """Three digits, without the unit."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"
