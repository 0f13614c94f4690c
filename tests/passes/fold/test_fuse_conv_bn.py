"""Folding batch norms into what feeds them: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir import Program
from ir_tools.torch_compat.modules import BatchNorm
from passes import CATALOGUE, Pass
from tests.check import (
    assert_numbers_agree,
    assert_same_graph,
    assert_sites_can_be_skipped,
    captured,
    ops,
    rewritten,
    with_random_statistics,
)

fuse_conv_bn = CATALOGUE["fuse_conv_bn"]
source = importlib.import_module("passes.fold.fuse_conv_bn")
folding = importlib.import_module("passes.fold.arithmetic")

EXACT = 1e-10
"""Relative error allowed to a fold in float64."""


class FunctionalBatchNorm(nn.Module):
    def __init__(self, first: nn.Module, features: int, training: bool = False):
        super().__init__()
        self.first = first
        self.training_flag = training
        self.register_buffer("mean", torch.randn(features))
        self.register_buffer("var", torch.rand(features) + 0.2)
        self.register_buffer("gamma", torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.first(x), self.mean, self.var, self.gamma, None, self.training_flag, 0.1, 1e-3)


class SharedConv(nn.Module):
    """One convolution called twice, each result with a batch norm of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, bias=False)
        self.first, self.second = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.conv(x)) + self.second(self.conv(x.neg()))


class SharedConvBareOnce(nn.Module):
    """One convolution, with a batch norm on one path only."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.bn(self.conv(x)) + self.conv(y)


class Chain(nn.Module):
    """bn(conv(bn(conv(x))))."""

    def __init__(self, bns: bool = True):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, bias=not bns), nn.Conv2d(4, 5, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(4) if bns else nn.Identity()
        self.bn_b = nn.BatchNorm2d(5) if bns else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.bn_b(self.b(self.bn_a(self.a(x))))


def without_batch_norms(model: nn.Sequential) -> nn.Sequential:
    """The expected result: no batch norm, and a bias in every layer."""
    model = copy.deepcopy(model)
    for name, module in model.named_children():
        if isinstance(module, BatchNorm):
            setattr(model, name, nn.Identity())
        elif module.bias is None:
            channels = getattr(module, "out_channels", None) or module.out_features
            module.bias = nn.Parameter(torch.zeros(channels, dtype=module.weight.dtype))
    return model.eval()


SEQUENTIAL: dict[str, tuple[Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, 2), nn.BatchNorm2d(4)), (2, 3, 9, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 5, 4, 3)),
    "no bias": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (2, 4, 6, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (2, 4, 6, 6)),
    "square weight": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
    "large eps": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.3)), (2, 3, 6, 6)),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), (2, 3, 6, 6)),
    "conv-bn-bn": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
    "transposed 1d": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 6)),
    "transposed 2d": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.BatchNorm2d(4)), (2, 3, 6, 6)),
    "transposed 3d": (lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 3, 3)),
    "transposed, grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
        (2, 4, 6, 6),
    ),
    "transposed, depthwise": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)),
        (2, 4, 6, 6),
    ),
    "transposed, square": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), (2, 4, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), (3, 5)),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)), (3, 4)),
}


def check_fold(name: str, fuse_conv_bn: Pass = fuse_conv_bn) -> None:
    """The folded Program has no batch norm left and gives the model's numbers, in float64."""
    build, shape = SEQUENTIAL[name]
    model, x = with_random_statistics(build()).double(), torch.randn(shape, dtype=torch.float64)
    after, log = rewritten(fuse_conv_bn, captured(model, x), x)
    assert "batch_norm" not in ops(after)
    assert len(log.rewrites) == sum(isinstance(m, BatchNorm) for m in model)
    assert_numbers_agree(model, after, x, within=EXACT)


# -- it rewrites, and the numbers agree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_it_folds(name: str) -> None:
    check_fold(name)


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("name", SEQUENTIAL)
def test_the_graph_is_the_same_module_without_batch_norms(name: str, frontend: str) -> None:
    build, shape = SEQUENTIAL[name]
    model, x = with_random_statistics(build()), torch.randn(shape)
    after, _ = rewritten(fuse_conv_bn, captured(model, x, frontend=frontend), x)
    assert_same_graph(after, without_batch_norms(model), x, frontend=frontend)


@pytest.mark.parametrize("frontend", ["trace", "export", "script", "fx"])
def test_functional_batch_norm_folds(frontend: str) -> None:
    model, x = FunctionalBatchNorm(nn.Conv2d(3, 4, 3), 4).double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    after, _ = rewritten(fuse_conv_bn, captured(model, x, frontend=frontend), x)
    assert ops(after) == ["conv2d"]
    assert_numbers_agree(model, after, x, within=EXACT)


def test_a_shared_conv_with_two_batch_norms_folds_once_per_call() -> None:
    model, x = with_random_statistics(SharedConv()).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    after, log = rewritten(fuse_conv_bn, captured(model, x), x)
    assert len(log.rewrites) == 2

    class TwoConvs(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 5, 3).double(), nn.Conv2d(3, 5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + self.other(x.neg())

    same = {"other.weight": "conv.weight", "other.bias": "conv.bias"}
    assert_same_graph(after, TwoConvs().eval(), x, called=same)
    assert_numbers_agree(model, after, x, within=EXACT)


def test_a_conv_reused_without_batch_norm_keeps_its_own_weights() -> None:
    """pytorch#197539, #104593: the bare call must not see the folded weights."""
    model = with_random_statistics(SharedConvBareOnce()).double()
    x, y = torch.randn(2, 2, 3, 6, 6, dtype=torch.float64)
    after, log = rewritten(fuse_conv_bn, captured(model, x, y), x, y)
    assert len(log.rewrites) == 1 and ops(after) == ["conv2d", "conv2d", "add"]
    assert_numbers_agree(model, after, x, y, within=EXACT)


def test_a_chain_folds_at_every_link() -> None:
    model, x = with_random_statistics(Chain()).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    after, log = rewritten(fuse_conv_bn, captured(model, x), x)
    assert [r.module for r in log.rewrites] == ["a", "b"]
    assert_same_graph(after, Chain(bns=False).double().eval(), x)
    assert_numbers_agree(model, after, x, within=EXACT)


def test_batch_norm_before_a_conv_stays() -> None:
    """Padding is added after the batch norm: folding it forwards would change the border."""
    model = with_random_statistics(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    x = torch.randn(2, 3, 6, 6)
    program = captured(model, x)
    after, log = rewritten(fuse_conv_bn, program, x)
    assert after is program and not log.refusals


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    after, _ = rewritten(fuse_conv_bn, captured(model, x), x)
    assert ops(after) == ["conv2d"]
    assert {t.dtype for t in after.constants.values()} == {dtype}
    assert_numbers_agree(model, after, x, within=8 * torch.finfo(dtype).eps)


def test_the_memory_layout_of_the_weight_is_kept() -> None:
    model = with_random_statistics(nn.Sequential(nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 6)
    after, _ = rewritten(fuse_conv_bn, captured(model, x), x)
    (weight,) = (t for t in after.constants.values() if t.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_the_users_tensors_are_not_written() -> None:
    model, x = with_random_statistics(SharedConv()), torch.randn(2, 3, 6, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rewritten(fuse_conv_bn, captured(model, x), x)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


# -- it refuses ---------------------------------------------------------------------------------------------------------


def refusal(model: nn.Module, *inputs: Tensor, frontend: str = "trace") -> str:
    """The one reason for which the pass leaves `model` alone."""
    program = captured(model.eval(), *inputs, frontend=frontend)
    after, log = rewritten(fuse_conv_bn, program, *inputs)
    assert after is program and not log.rewrites
    (refused,) = log.refusals
    return refused.reason


FROZEN = "requirement not met: The batch norm uses its stored statistics, not those of the batch."
AXIS = (
    "requirement not met: The layer's channels are the axis that the batch norm normalises "
    "(convolutions batched, linears of two axes)."
)
MOVED = (
    "requirement not met: The features of the linear are moved from its last axis to the second, "
    "which the batch norm normalises."
)


def test_statistics_of_the_batch_are_refused() -> None:
    """pytorch#71259: no running statistics."""
    x = torch.randn(2, 3, 6, 6)
    assert refusal(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), x) == FROZEN
    assert refusal(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)), x[0, :, 0, :3]) == FROZEN
    transposed = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert refusal(transposed, x) == FROZEN


def test_a_batch_norm_in_training_is_refused_and_its_statistics_are_state() -> None:
    model, x = FunctionalBatchNorm(nn.Conv2d(3, 4, 3), 4, training=True), torch.randn(2, 3, 6, 6)
    before = model.mean.clone()
    assert refusal(model, x) == "mean is written in place"
    assert torch.equal(model.mean, before), "running the Program moved the user's statistics"
    assert captured(model, x).state == {"mean", "var"}


def test_a_linear_with_more_than_two_axes_is_refused() -> None:
    """pytorch#118990: batch norm normalises axis 1, the linear's features are the last axis."""
    model = with_random_statistics(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    assert refusal(model, torch.randn(4, 8, 8)) == AXIS


class Moved(nn.Module):
    """A linear whose result is moved before its batch norm, as point clouds and sequences have it."""

    def __init__(self, *axes: int, features: int = 4):
        super().__init__()
        self.axes = axes
        self.linear, self.bn = nn.Linear(3, 4), nn.BatchNorm1d(features) if len(axes) < 4 else nn.BatchNorm2d(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.transpose(*self.axes) if len(self.axes) == 2 else y.permute(*self.axes))


@pytest.mark.parametrize(
    "axes, shape",
    [((1, 2), (2, 5, 3)), ((-1, 1), (2, 5, 3)), ((0, 2, 1), (2, 5, 3)), ((0, 3, 1, 2), (2, 5, 6, 3))],
)
def test_a_linear_folds_where_its_features_become_the_second_axis(axes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    model, x = with_random_statistics(Moved(*axes)).double(), torch.randn(shape, dtype=torch.float64)
    for frontend in ("trace", "export"):
        after, log = rewritten(fuse_conv_bn, captured(model, x, frontend=frontend), x)
        assert len(log.rewrites) == 1 and len(after.calls) == 2 and "batch_norm" not in ops(after)
        assert_numbers_agree(model, after, x, within=EXACT)


class Flattened(nn.Module):
    """LeViT's linear and batch norm: the rows of all pictures are normalised together."""

    def __init__(self, *sizes: int, features: int = 4):
        super().__init__()
        self.sizes, self.linear, self.bn = sizes, nn.Linear(3, 4), nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(y.reshape(self.sizes) if self.sizes else y.flatten(0, -2)).reshape_as(y)


@pytest.mark.parametrize("frontend", ["trace", "export"])
@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 5, 6, 3)], ids=str)
def test_a_linear_folds_where_its_rows_are_flattened(shape: tuple[int, ...], frontend: str) -> None:
    model, x = with_random_statistics(Flattened()).double(), torch.randn(shape, dtype=torch.float64)
    after, log = rewritten(fuse_conv_bn, captured(model, x, frontend=frontend), x)
    assert len(log.rewrites) == 1 and "batch_norm" not in ops(after)
    assert_numbers_agree(model, after, x, within=EXACT)


def test_a_linear_whose_features_are_mixed_with_rows_is_refused() -> None:
    x = torch.randn(4, 4, 3)
    assert refusal(with_random_statistics(Flattened(8, 8, features=8)), x) == MOVED
    assert refusal(with_random_statistics(Flattened(2, 4, 8, features=4)), x) == MOVED


def test_a_linear_moved_elsewhere_is_refused() -> None:
    assert refusal(with_random_statistics(Moved(0, 1, features=3)), torch.randn(3, 2, 3)) == MOVED
    assert refusal(with_random_statistics(Moved(1, 0, 2, features=3)), torch.randn(3, 3, 3)) == MOVED


def test_statistics_that_would_make_a_weight_infinite_are_refused() -> None:
    model = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.0)))
    model[1].running_var[2] = 0.0
    assert refusal(model, torch.randn(2, 3, 6, 6)) == "the folded weight or bias would not be finite"
    half = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    half[0].half()
    with torch.no_grad():
        half[1].weight.fill_(1e6)
    assert refusal(half, torch.randn(2, 3, 6, 6).half()) == "the folded weight or bias would not be finite"


@pytest.mark.parametrize("layer, height", [(nn.Conv2d(3, 4, 3), 6), (nn.ConvTranspose2d(3, 4, 3), 2)])
def test_an_unbatched_conv_is_refused(layer: nn.Module, height: int) -> None:
    """The batch norm takes the height, here 4 too, for the channels: folding would give plausible, wrong numbers."""
    assert refusal(FunctionalBatchNorm(layer, 4), torch.randn(3, height, 6), frontend="export") == AXIS


def test_an_unbatched_conv_gives_right_numbers_through_every_front_end() -> None:
    model, x = FunctionalBatchNorm(nn.Conv2d(3, 4, 3), 4).double().eval(), torch.randn(3, 6, 6, dtype=torch.float64)
    for frontend in ("trace", "export", "script", "fx"):
        after, log = rewritten(fuse_conv_bn, captured(model, x, frontend=frontend), x)
        assert not log.rewrites
        assert_numbers_agree(model, after, x, within=EXACT)


class SecondUser(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y.relu()


class ConvIsAnOutput(SecondUser):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.bn(y), y


class WrittenInPlace(SecondUser):
    """A write into a part of the convolution's result, which the batch norm then reads."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, 0].mul_(3.0)
        return self.bn(y)


class InputWrittenInPlace(SecondUser):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(1.0)
        return self.bn(self.conv(x))


class WeightAtRunTime(SecondUser):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.bn(F.conv2d(x, w))


def test_a_second_user_is_refused() -> None:
    x = torch.randn(2, 3, 6, 6)
    assert refusal(with_random_statistics(SecondUser()), x) == "the result of conv2d conv has another user (relu relu)"
    output = refusal(with_random_statistics(ConvIsAnOutput()), x)
    assert output == "the result of conv2d conv has another user (the model's output)"


def test_a_result_written_in_place_is_refused() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    model = with_random_statistics(WrittenInPlace()).double()
    assert "another user (select" in refusal(model, x)
    assert_numbers_agree(model, fuse_conv_bn(captured(model, x)), x, within=EXACT)
    assert refusal(with_random_statistics(InputWrittenInPlace()).double(), x).endswith("is written in place")


def test_weights_known_at_run_time_only_are_refused() -> None:
    x, w = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
    assert refusal(with_random_statistics(WeightAtRunTime()), x, w) == "known at run time only: w"


# -- sites --------------------------------------------------------------------------------------------------------------


def test_each_site_can_be_skipped() -> None:
    model, x = with_random_statistics(Chain()), torch.randn(2, 3, 6, 6)

    def capture_again() -> Program:
        return captured(model, x)

    assert_sites_can_be_skipped(fuse_conv_bn, capture_again, x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


right_affine = folding.batch_norm_as_affine


def _no_square_root(gamma, beta, mean, var, eps):
    s = gamma.double() / (var.double() + eps)
    return s, beta.double() - mean.double() * s


def _no_eps(gamma, beta, mean, var, eps):
    return right_affine(gamma, beta, mean, var, 0.0)


def _no_mean(gamma, beta, mean, var, eps):
    return right_affine(gamma, beta, torch.zeros_like(mean), var, eps)


def _no_beta(gamma, beta, mean, var, eps):
    return right_affine(gamma, None, mean, var, eps)


def _no_gamma(gamma, beta, mean, var, eps):
    return right_affine(None, beta, mean, var, eps)


def _in_float32(gamma, beta, mean, var, eps):
    s, t = right_affine(gamma, beta, mean, var, eps)
    return s.float().double(), t


SABOTAGES = [_no_square_root, _no_eps, _no_mean, _no_beta, _no_gamma, _in_float32]


@pytest.mark.parametrize("broken", SABOTAGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ["conv2d", "transposed 2d", "linear"])
def test_broken_arithmetic_is_noticed(name: str, broken: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "batch_norm_as_affine", broken)
    with pytest.raises(AssertionError, match="relative error"):
        check_fold(name)


@pytest.mark.parametrize("name", ["square weight", "linear, no bias", "transposed, square"])
def test_the_wrong_axis_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "scaled_outputs", folding.scaled_inputs)
    with pytest.raises(AssertionError, match="relative error"):
        check_fold(name)


def test_a_lost_bias_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "refolded", lambda op, layer, x, w, new_w, b: op.like(layer, x, new_w.to(w), layer.bias))
    with pytest.raises(AssertionError, match="relative error"):
        check_fold("conv2d")
