"""Merging adjacent linear layers: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from passes import CATALOGUE, Pass, Rule, rule_pass
from tests.check import assert_sites_can_be_skipped, captured
from tests.layers import check_folds, refusals

merge_linear_chains = CATALOGUE["merge_linear_chains"]
source = importlib.import_module("passes.fold.merge_linear_chains")

CHAINS: dict[str, tuple[list[nn.Module], tuple[int, ...]]] = {
    "linears": ([nn.Linear(4, 5), nn.Linear(5, 3)], (2, 4)),
    "linears, three axes, one bias": ([nn.Linear(4, 4, bias=False), nn.Linear(4, 4)], (2, 5, 4)),
    "linears, the other bias": ([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)], (2, 4)),
    "linears, no bias": ([nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)], (2, 4)),
    "three linears": ([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)], (2, 4)),
    "conv1x1 behind": ([nn.Conv2d(3, 5, 3, 2, 1, 2), nn.Conv2d(5, 3, 1)], (2, 3, 7, 7)),
    "conv1x1 behind, conv1d": ([nn.Conv1d(3, 5, 3), nn.Conv1d(5, 3, 1, bias=False)], (2, 3, 7)),
    "conv1x1 behind, conv3d": ([nn.Conv3d(3, 5, 2), nn.Conv3d(5, 3, 1)], (2, 3, 4, 4, 4)),
    "conv1x1 before": ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 3, 2)], (2, 4, 7, 7)),
    "conv1x1 before, conv1d": ([nn.Conv1d(4, 4, 1), nn.Conv1d(4, 3, 3)], (2, 4, 7)),
    "conv1x1 before, no bias, padded": ([nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 3, 3, padding=1)], (2, 4, 7, 7)),
    "1x1 convolutions": ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)], (2, 4, 7, 7)),
}


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    layers, shape = CHAINS[name]
    return nn.Sequential(*layers).double().eval(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", CHAINS)
def test_it_merges(name: str, frontend: str) -> None:
    model, x = model_and_input(name)
    log = check_folds(merge_linear_chains, model, x, frontend=frontend)
    assert len(log.rewrites) == len(CHAINS[name][0]) - 1


def test_the_memory_layout_of_the_weight_is_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)).eval().to(memory_format=torch.channels_last)
    after = merge_linear_chains(captured(model, torch.randn(1, 3, 8, 8)))
    (weight,) = (t for t in after.constants.values() if t.dim() == 4)
    assert weight.shape == (4, 3, 3, 3) and weight.is_contiguous(memory_format=torch.channels_last)


# -- it refuses ---------------------------------------------------------------------------------------------------------

WORK = "requirement not met: The merged weight has fewer elements than the two together."
GROUPED = "requirement not met: Neither convolution is grouped."
SECOND = "requirement not met: The second convolution is 1x1, of stride 1, and pads nothing."
FIRST = "requirement not met: The first convolution is 1x1, of stride 1, and pads nothing."
BIAS = (
    "requirement not met: The second convolution pads nothing, or the first has no bias "
    "(what is padded is zero, not that bias)."
)
REFUSED: dict[str, tuple[list[nn.Module], list[str]]] = {
    "a bottleneck": ([nn.Linear(8, 2), nn.Linear(2, 8)], [WORK]),
    "a convolution that would grow": ([nn.Conv2d(8, 2, 3), nn.Conv2d(2, 16, 1)], [WORK, FIRST]),
    "a depthwise first": ([nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1)], [GROUPED] * 2),
    "a grouped second": ([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, groups=2)], [GROUPED] * 2),
    "no 1x1": ([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)], [SECOND, FIRST]),
    "a strided 1x1 first": ([nn.Conv2d(8, 8, 1, 2), nn.Conv2d(8, 8, 3)], [SECOND, FIRST]),
    "a strided 1x1 second": ([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, 2)], [SECOND, FIRST]),
    "a padded 1x1": ([nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, padding=1)], [SECOND, FIRST]),
    "a bias under padding": ([nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)], [SECOND, BIAS]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str) -> None:
    layers, reasons = REFUSED[name]
    x = torch.randn(2, 8, *([6, 6] if isinstance(layers[0], nn.Conv2d) else []))
    assert refusals(merge_linear_chains, nn.Sequential(*layers), x) == reasons


def test_an_inner_result_that_is_read_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) * y

    (reason,) = refusals(merge_linear_chains, Twice(), torch.randn(2, 4))
    assert "has another user (mul" in reason


def test_each_site_can_be_skipped() -> None:
    model = nn.Sequential(*CHAINS["linears"][0], nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 3)).eval()
    x = torch.randn(2, 4, dtype=torch.float64)
    assert_sites_can_be_skipped(merge_linear_chains, lambda: captured(model.double(), x), x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linears", "conv1x1 behind", "conv1x1 before"])
def test_a_lost_bias_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_input(name)
    monkeypatch.setattr(source, "bias", lambda second, w2, b1, b2: b2.double())
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(merge_linear_chains, model, x)


def test_factors_in_the_wrong_order_are_noticed() -> None:
    def swapped(op, first, second, x, w1, b1, w2, b2):
        return source.refolded(op, first, x, w1, w1.double() @ w2.double(), source.bias(second, w2, b1, b2))

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double().eval(), torch.randn(2, 4).double()
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(only(source.linear_of_linear, swapped), model, x)


def test_merging_a_bias_under_padding_would_be_noticed() -> None:
    wrong = only(source.conv_of_pointwise, source.merged_into_second)
    model = nn.Sequential(*REFUSED["a bias under padding"][0]).double().eval()
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(wrong, model, torch.randn(2, 8, 6, 6).double())


def only(match, replace) -> Pass:
    return rule_pass("wrong", [Rule("wrong", match=match, replace=replace)], effects={"rounds"}, doc="")
