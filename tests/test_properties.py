"""Random models x random subsets of passes in legal order x front ends agree with eager."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ir_tools.frontends.capture import FRONTENDS
from ir_tools.frontends.source import prepare
from passes import CATALOGUE
from passes.testing import CaptureRefused, Trial
from passes.testing.phrases.registry import PHRASES
from passes.testing.search import Failure, search
from tests.strategies import pipelines, random_models

EXACT_ENOUGH = [name for name in CATALOGUE if name not in ("cast_half", "lower_onednn")]
UNLOWERED = [name for name, pass_ in CATALOGUE.items() if pass_.target is None]
drawing = settings(suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink))
pytestmark = pytest.mark.filterwarnings("ignore")


def passed_over(failure: Failure) -> bool:
    return isinstance(failure.error, CaptureRefused)


@st.composite
def trials(
    draw: st.DrawFn, phrases: list[str], dtype: torch.dtype, names: list[str], at_least: list[str], engines: list[str | None]
) -> Trial:
    frontend = draw(st.sampled_from(["trace"] * 6 + ["fx"]))
    passes = tuple(draw(pipelines(names, at_least)))
    return Trial(draw(random_models(phrases, dtypes=(dtype,))), passes, frontend, draw(st.sampled_from(engines)))


def test_any_passes_agree_with_eager_in_float64():
    """The invariants of each pass; and most models are rewritten: a strategy that no rule meets would prove nothing."""
    drawn = trials([], torch.float64, EXACT_ENOUGH, ["fuse_conv_bn", "fuse_conv_relu"], [None])
    tally, failure = search(drawn, Trial.run, examples=10 * settings().max_examples, seed=0, expected=passed_over)
    assert failure is None, failure and failure.trial.as_test(failure.why)
    print(f"no rule fired on {tally.share_untouched:.0%} of {tally.models} random models")
    assert tally.captured.total() > 0.9 * tally.models
    assert tally.share_untouched <= 0.3


def test_any_passes_agree_with_eager_in_float32():
    """Compiled, saved and loaded."""
    drawn = trials([], torch.float32, UNLOWERED, [], ["aten", "onednn_ops"])
    tally, failure = search(drawn, Trial.run, examples=2 * settings().max_examples, seed=0, expected=passed_over)
    assert failure is None, failure and failure.trial.as_test(failure.why)
    assert tally.captured["aten: emitted, saved, loaded"] and tally.captured["onednn_ops: emitted, saved, loaded"]


ONE_GRAPH = [
    "conv_norm", "norm_of_norm", "linear_norm", "norm_conv", "norm_linear", "linear_linear", "conv_pointwise",
    "pointwise_conv", "query_key_value", "pieces",
]  # fmt: skip
"""Phrases without in-place writes, random numbers, and numbers that a front end may fold."""


@settings(drawing, max_examples=settings().max_examples)
@given(random_models(ONE_GRAPH, most=2))
def test_front_ends_capture_one_graph(model):
    assert set(ONE_GRAPH) <= set(PHRASES)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module = model.module()
        source = prepare(module, [(model.inputs(), {})])
        programs = [FRONTENDS[name](source) for name in ("export", "trace", "fx")]
    targets = [[str(node.target) for node in program.calls] for program in programs]
    assert targets[0] and targets[0] == targets[1] == targets[2]
