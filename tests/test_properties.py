"""Random small conv nets x random subsets of passes in legal order x front ends agree with eager."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from passes import CATALOGUE, optimize
from tests.strategies import conv_nets, pipelines

NOT_OF_CONV_NETS = frozenset(
    """remove_neutral_ops simplify_views eliminate_common_subexpressions use_stable_forms merge_parallel_linears
    fuse_attention""".split()
)
"""Passes for which a random conv net has no work: any number of them would leave most models untouched."""

EXACT_ENOUGH = [name for name in CATALOGUE if name not in ("cast_half", "lower_onednn", *NOT_OF_CONV_NETS)]
slow_start = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def test_any_passes_agree_with_eager_in_float64():
    """And most of the random models are rewritten: a strategy that no rule meets would prove nothing."""
    rewrites: list[int] = []

    @slow_start
    @given(conv_nets(), pipelines(EXACT_ENOUGH), st.sampled_from(["export", "trace", "fx"]))
    def agrees(net_and_input, pipeline, frontend):
        net, x = net_and_input
        net, x = net.double(), x.double()
        expected = net(x)
        fast = optimize(net, pipeline, example_inputs=x, frontend=frontend, engine="aten")
        rewrites.append(sum(len(step.rewrites) for step in fast.report.steps))
        error = (fast(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
        assert error <= 1e-10
        assert torch.equal(net(x), expected)

    agrees()
    untouched = sum(count == 0 for count in rewrites) / len(rewrites)
    print(f"no rule fired on {untouched:.0%} of {len(rewrites)} random models")
    assert untouched <= 0.3


@slow_start
@given(conv_nets(), pipelines(list(CATALOGUE)))
def test_any_passes_agree_with_eager_in_float32(net_and_input, pipeline):
    net, x = net_and_input
    expected = net(x)
    fast = optimize(net, pipeline, example_inputs=x, frontend="trace")
    noise = (fast(x) - expected).double().square().sum()
    signal = expected.double().square().sum()
    smallest_db = 10 if "cast_half" in pipeline else 90
    assert noise <= signal * 10 ** (-smallest_db / 10) + 1e-12
    other = torch.randn_like(x)
    noise = (fast(other) - net(other)).double().square().sum()
    assert noise <= net(other).double().square().sum() * 10 ** (-smallest_db / 10) + 1e-12


@slow_start
@given(conv_nets())
def test_front_ends_capture_one_graph(net_and_input):
    net, x = net_and_input
    source = prepare(net, [((x,), {})])
    programs = [capture(source, frontend).program for frontend in ("export", "trace", "fx")]
    spelled = [[str(node.target) for node in program.calls] for program in programs]
    assert spelled[0] and spelled[0] == spelled[1] == spelled[2]
