"""Searching for a model on which something fails, and minimizing it (hypothesis)."""

from __future__ import annotations

import contextlib
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase

from passes.testing.invariants import InvariantBroken
from passes.testing.tally import Tally, kind_of
from passes.testing.trial import Trial

SHRINK_SECONDS = 20.0
"""How long a failing model is minimized."""

MOST_BYTES = 4096
"""Random bytes that one trial is drawn from; a larger one is rejected."""


@dataclass
class Failure:
    """A model on which something failed, and what."""

    trial: Trial
    error: Exception

    @property
    def kind(self) -> str:
        """The error without what belongs to one model alone; failures of one kind are one failure."""
        error = self.error
        kind = getattr(error, "kind", "") or kind_of(str(error).partition(";")[0])
        if not isinstance(error, InvariantBroken):
            kind += f" in {traceback.extract_tb(error.__traceback__)[-1].name}"
        return f"{type(error).__name__}: {kind}"

    @property
    def why(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


class _TimeIsUp(BaseException):
    """Leaves hypothesis' shrinking; no Exception, which would be one more failure to shrink."""


def search(
    trials: st.SearchStrategy[Trial],
    run: Callable[[Trial], Tally],
    *,
    examples: int,
    seed: int,
    shrink_seconds: float = SHRINK_SECONDS,
    expected: Callable[[Failure], bool] = lambda failure: False,
) -> tuple[Tally, Failure | None]:
    """Run `examples` trials; the counts of those that held, and the first failure, minimized.

    A failure that is `expected` is passed over, and counts as a model on which nothing fired. The same seed gives the same
    trials. They are drawn from random bytes: hypothesis' own generation repeats itself (a quarter of 1000 models was not new).
    """
    tally, smallest, deadline = Tally(), None, 0.0

    def one(trial: Trial) -> None:
        nonlocal smallest, deadline
        if smallest is not None and time.monotonic() > deadline:
            raise _TimeIsUp
        try:
            done = run(trial)
        except Exception as error:
            failure = Failure(trial, error)
            if expected(failure):
                tally.models += 1
                return
            if smallest is None:
                deadline = time.monotonic() + shrink_seconds
                smallest = failure
            elif failure.kind == smallest.kind and trial.size <= smallest.trial.size:
                smallest = failure
            raise
        if smallest is None:
            tally.add(done)

    configured = settings(
        database=InMemoryExampleDatabase(), deadline=None, report_multiple_bugs=False, print_blob=False,
        suppress_health_check=list(HealthCheck), phases=(Phase.reuse, Phase.shrink),
    )  # fmt: skip
    test = configured(hypothesis.given(trials)(one))
    numbers, start = random.Random(seed), time.perf_counter()
    try:
        for _ in range(3 * examples):  # some bytes give no model
            if tally.models >= examples:
                break
            test.hypothesis.fuzz_one_input(numbers.randbytes(MOST_BYTES))  # type: ignore[attr-defined]
    except Exception:
        if smallest is None:
            raise
        with contextlib.suppress(_TimeIsUp, Exception):  # the failure is in the database now: reuse it, and shrink
            test()
    tally.seconds = time.perf_counter() - start
    return tally, smallest
