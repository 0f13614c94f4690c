"""Timers that return given figures, and a lowering with given tuning records. The fixture `use_timer` puts a timer in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ir_tools.ir import Block
from ir_tools.rewrite import Pass, RewriteLog
from passes import CATALOGUE
from passes.tune.speed_comparison import WARM_UP_SECONDS, Candidate
from passes.tune.timing import Timer, interleaved_seconds
from passes.tune.tuning_record import TuningRecords

Times = dict[str, list[float]]
UseTimer = Callable[[Timer], None]


def winner(position: int, counts: list[int] | None = None) -> Timer:
    """A timer by which the variant at `position` (the last one, where there are fewer) takes no time.

    `counts` gets the number of variants of each measurement.
    """

    def timer(calls: Mapping[str, Any], **given: Any) -> Times:
        if counts is not None:
            counts.append(len(calls))
        return {name: [float(i != min(position, len(calls) - 1))] for i, name in enumerate(calls)}

    return timer


def never(calls: Mapping[str, Any], **given: Any) -> Times:
    raise AssertionError("nothing was to be measured")


class SpeedComparisons:
    """A timer of speed comparisons: each measurement gives the next of `results`, the last one over and over.

    `seen`: the candidates of each measurement. Warm-up rounds give nothing; variants of kernels are really timed.
    """

    def __init__(self, *results: Times):
        self.results = results
        self.seen: list[Mapping[str, Candidate]] = []

    def __call__(self, calls: Mapping[str, Any], *, seconds: float, **given: Any) -> Times:
        if set(calls) != {"without", "with"}:
            return interleaved_seconds(calls, seconds=seconds, **given)
        if seconds == WARM_UP_SECONDS:
            return {}
        self.seen.append(calls)
        return self.results[min(len(self.seen), len(self.results)) - 1]


def lowering_with(records: TuningRecords) -> Pass:
    """`lower_onednn` with these tuning records."""
    lower: Callable[..., Any] = CATALOGUE["lower_onednn"].function

    def with_records(program: Block, log: RewriteLog) -> tuple[Block, TuningRecords]:
        return lower(program, log, records)

    return replace(CATALOGUE["lower_onednn"], function=with_records)
