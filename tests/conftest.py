"""Set-up shared by all tests: generated examples, threads, seeds."""

import os

import pytest
import torch
from hypothesis import settings

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
