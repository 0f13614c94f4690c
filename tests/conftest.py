"""Set-up shared by all tests: generated examples, threads, seeds."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from hypothesis import settings

from passes.tune.timing import Timer, using_timer

settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None, print_blob=True)
settings.register_profile("long", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; more threads than cores only spin
    torch.set_num_threads(1)

torch.manual_seed(0)  # torch seeds itself anew in every process; this is for values that test files make when imported


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def use_timer() -> Iterator[Callable[[Timer], None]]:
    """A function: until the test ends or calls it again, tuning and speed comparisons time calls with the given timer."""
    with ExitStack() as timers:

        def use(timer: Timer) -> None:
            timers.enter_context(using_timer(timer))

        yield use
