"""Folding a batch norm into the layer that reads it: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes import CATALOGUE, Rule, rule_pass
from tests.check import assert_sites_can_be_skipped, captured, with_random_statistics
from tests.layers import OVERLAPPING, PADDED, SHIFTED, check_folds, input_channels, layer_and_input, refusals

fuse_bn_conv = CATALOGUE["fuse_bn_conv"]
source = importlib.import_module("passes.fold.fuse_bn_conv")

TWO_AXES = tuple(name for name in SHIFTED if name not in ("linear, three axes", "linear, one axis"))
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def model_and_input(name: str, **options: bool) -> tuple[nn.Module, Tensor]:
    layer, x = layer_and_input(name)
    norm = NORMS[x.dim()](input_channels(layer), **options)
    return with_random_statistics(nn.Sequential(norm, layer)).double(), x


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", TWO_AXES)
def test_it_folds(name: str, affine: bool) -> None:
    model, x = model_and_input(name, affine=affine)
    check_folds(fuse_bn_conv, model, x)


@pytest.mark.parametrize("frontend", ["export", "fx", "script"])
def test_it_folds_through_every_front_end(frontend: str) -> None:
    model, x = model_and_input("conv2d, grouped")
    check_folds(fuse_bn_conv, model, x, frontend=frontend)


def test_two_batch_norms_fold_from_the_nearest_on() -> None:
    model = with_random_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3))).double()
    assert len(check_folds(fuse_bn_conv, model, torch.randn(2, 3, 6, 6).double()).rewrites) == 2


# -- it refuses ---------------------------------------------------------------------------------------------------------

PADS = "requirement not met: The layer pads nothing, so that every output sees a whole window of its input."
FROZEN = "requirement not met: The batch norm uses its stored statistics, not those of the batch."
AXIS = (
    "requirement not met: The axis that the batch norm normalises holds the layer's input channels "
    "(convolutions batched, linears of two axes)."
)


@pytest.mark.parametrize("name", [*PADDED, *OVERLAPPING])
def test_batch_norm_before_a_padded_convolution_is_refused(name: str) -> None:
    model, x = model_and_input(name)
    assert refusals(fuse_bn_conv, model, x) == [PADS]


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_of_another_kind_stands_between_them(mode: str) -> None:
    model = with_random_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)))
    assert refusals(fuse_bn_conv, model, torch.randn(2, 3, 6, 6)) == []


def test_statistics_of_the_batch_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Conv2d(3, 4, 3))
    assert refusals(fuse_bn_conv, model, torch.randn(2, 3, 6, 6)) == [FROZEN]


def test_another_axis_is_refused() -> None:
    """The batch norm normalises the second axis; the linear's features are its last."""
    model = with_random_statistics(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)))
    assert refusals(fuse_bn_conv, model, torch.randn(2, 4, 4)) == [AXIS]

    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.batch_norm(x, self.mean, self.var))

    assert refusals(fuse_bn_conv, Unbatched(), torch.randn(4, 4, 6)) == [AXIS]


def test_a_batch_norm_that_is_read_twice_is_refused() -> None:
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.a, self.b = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(x)
            return self.a(y) * self.b(y)

    reasons = refusals(fuse_bn_conv, with_random_statistics(Dense()), torch.randn(2, 3, 6, 6))
    assert len(reasons) == 2 and all("has another user (conv2d" in reason for reason in reasons)


def test_each_site_can_be_skipped() -> None:
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)]
    model, x = with_random_statistics(nn.Sequential(*layers)), torch.randn(2, 3, 8, 8)
    assert_sites_can_be_skipped(fuse_bn_conv, lambda: captured(model, x), x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, broken",
    [
        ("scaled_inputs", lambda layer, w, s: w.double()),
        ("layer_sum", lambda layer, w, t: 0 * w.double()[:, 0, 0, 0]),
        ("batch_norm_as_affine", lambda gamma, beta, mean, var, eps: (gamma.double() / (var + eps).sqrt(), beta)),
    ],
    ids=["unscaled", "no shift", "no mean"],
)
def test_broken_arithmetic_is_noticed(name: str, broken: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_and_input("conv2d, square")
    monkeypatch.setattr(source, name, broken)
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(fuse_bn_conv, model, x)


@pytest.mark.parametrize("name", [*PADDED, "conv_transpose2d"])
def test_folding_over_padding_would_be_noticed(name: str) -> None:
    rule = Rule("wrong", match=source.layer_of_batch_norm, replace=source.folded_forward)
    model, x = model_and_input(name)
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(rule_pass("wrong", [rule], effects={"rounds"}, doc=""), model, x)
