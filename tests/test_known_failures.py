"""What users of other tools suffer when batch norms are folded, line by line: the issue, the model, the outcome wanted.

Every model goes through `optimize`, whose passes are those that a user would name; float64, so that a wrong fold shows.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.torchvision_ops import import_torchvision
from passes import CaptureError, Report, optimize
from tests.check import with_random_statistics

FOLDS = ["fold_constants", "fuse_conv_bn", "fold_affine", "fuse_bn_conv", "fold_input_affine"]


def folded(model: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float64, within: float = 1e-10) -> Report:
    """The report of `optimize`, once its numbers are known to be the model's."""
    model = with_random_statistics(model).to(dtype)
    inputs = tuple(x.to(dtype) for x in inputs)
    fast = optimize(model, FOLDS, example_inputs=inputs)
    expected, got = model(*inputs), fast(*inputs)
    assert got.dtype == expected.dtype
    assert (got - expected).abs().max() <= within * expected.abs().max()
    return fast.report


def rewrites(report: Report) -> int:
    """Of the folding passes; lowering comes behind them."""
    return sum(len(step.rewrites) for step in report.steps if step.name in FOLDS)


def refusals(report: Report) -> list[tuple[str, str]]:
    return [(refused.module, refused.reason) for step in report.steps if step.name in FOLDS for refused in step.refusals]


X = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("shared_input", [True, False])
def test_pytorch_197539_104593_a_convolution_reused_without_batch_norm(shared_input: bool) -> None:
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.conv(x if shared_input else y)

    report = folded(Reused(), X, torch.randn_like(X))
    assert rewrites(report) == 1 and report.ops_left["conv2d"] == 2


def test_pytorch_124808_ao_2795_one_weight_in_several_chains() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.b.weight = self.a.weight
            self.bn_a, self.bn_b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn_a(self.a(x)) + self.bn_b(self.b(x)) + self.bn_a(self.b(x.exp()))

    assert rewrites(folded(Tied(), X)) == 3


@pytest.mark.parametrize("shape, norm", [((4, 8, 8), nn.BatchNorm1d(8)), ((2, 8, 4, 8), nn.BatchNorm2d(8))], ids=["3-D", "4-D"])
def test_pytorch_118990_a_linear_whose_channels_are_not_normalised(shape: tuple[int, ...], norm: nn.Module) -> None:
    report = folded(nn.Sequential(nn.Linear(8, 8), norm), torch.randn(shape))
    assert rewrites(report) == 0
    assert ("0", "requirement not met: The layer's channels are the axis that the batch norm normalises "
            "(convolutions batched, linears of two axes).") in refusals(report)  # fmt: skip
    assert rewrites(folded(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), torch.randn(4, 8))) == 1


def test_pytorch_72049_batch_norm_without_affine() -> None:
    assert rewrites(folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), X)) == 1


def test_pytorch_71259_batch_norm_without_statistics() -> None:
    report = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), X)
    assert rewrites(report) == 0
    assert ("0", "requirement not met: The batch norm uses its stored statistics, not those of the batch.") in refusals(report)


def test_pytorch_122070_functional_batch_norm() -> None:
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            for name in ("mean", "gamma", "beta"):
                self.register_buffer(name, torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, eps=1e-2)

    assert rewrites(folded(Functional(), X)) == 1


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pytorch_180995_ao_1462_executorch_22517_onnxruntime_14270_transposed_convolutions(dims: int, groups: int) -> None:
    conv = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dims - 1](4, 8, 3, 2, 1, groups=groups)
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](8)
    assert rewrites(folded(nn.Sequential(conv, norm), torch.randn(2, 4, *[4] * dims))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pytorch_76578_half_weights_stay_half(dtype: torch.dtype) -> None:
    model = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model[0].to(dtype)  # the batch norm keeps its float statistics
    x = X.to(dtype)
    fast = optimize(model, "fuse_conv_bn", example_inputs=x)
    assert rewrites(fast.report) == 1
    assert {p.dtype for p in fast.program.constants.values()} == {dtype}
    assert (fast(x) - model(x)).abs().max() <= 16 * torch.finfo(dtype).eps * model(x).abs().max()


def test_pytorch_99524_two_batch_norms_behind_a_convolution() -> None:
    report = folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), X)
    assert rewrites(report) == 2 and "batch_norm" not in report.ops_left


def test_pytorch_87777_ipex_250_transformers_19870_what_fx_cannot_trace_folds_all_the_same() -> None:
    """Where a fold is refused, location and reason are reported."""

    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
            self.bn, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor, **options: bool) -> Tensor:
            y = self.bn(self.first(x))
            assert len(y.shape) == 4 and y.shape[1] in {4: "yes"}, "fx cannot follow this"
            z = self.second(F.relu(y))
            return self.other(z) + z.mean()

    model = with_random_statistics(Asks())
    with pytest.raises(Exception, match="fx"):
        optimize(model, FOLDS, example_inputs=X, frontend="fx")
    report = folded(model, X)
    assert report.frontend == "export" and rewrites(report) == 1
    reasons = {reason for module, reason in refusals(report) if module == "second"}
    assert reasons == {"the result of conv2d second has another user (mean mean)"}


def test_pytorch_127513_folds_are_counted_on_real_models() -> None:
    """A change upstream that keeps the rule from firing shows here: the counts are those of the architecture."""
    torchvision = import_torchvision()
    counts = {"resnet18": 20, "mobilenet_v2": 52, "shufflenet_v2_x0_5": 56}
    for name, count in counts.items():
        model = with_random_statistics(getattr(torchvision.models, name)(weights=None))
        assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == count
        report = optimize(model, "fuse_conv_bn", example_inputs=torch.randn(1, 3, 32, 32), dry_run=True)
        assert rewrites(report) == count and "batch_norm" not in report.ops_left, name


def test_pytorch_68301_174938_166009_a_product_in_place_is_no_dead_code() -> None:
    class Scaled(nn.Module):
        """As timm's nfnet has it: the result of `mul_` is not used, what it wrote is."""

        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn(self.conv(x))
            y.mul_(0.2)
            part = y[:, 0]
            part.add_(1.0)
            return y + x

    report = folded(Scaled(), X)
    assert rewrites(report) >= 1


def test_pytorch_68301_timm_nfnet() -> None:
    import_torchvision()
    import timm

    model = timm.create_model("test_nfnet", pretrained=False).eval()
    x = torch.randn(1, 3, 64, 64)
    fast = optimize(model, [*FOLDS, "remove_dead_code"], example_inputs=x)
    expected = model(x)
    assert (fast(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_pytorch_80861_a_zero_before_the_convolution() -> None:
    class FromZero(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            total = 0
            for conv in [self.conv]:
                total = total + conv(x)
            return self.bn(total)

    report = folded(FromZero(), X)
    assert rewrites(report) == 2 and "batch_norm" not in report.ops_left and "add" not in report.ops_left


def test_pytorch_111322_channels_that_do_not_fit_are_an_error() -> None:
    model = with_random_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)))
    with pytest.raises(CaptureError, match=r"the model itself fails on the example inputs: RuntimeError: .*4.*5"):
        optimize(model, FOLDS, example_inputs=X)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.ConvTranspose2d(3, 4, 3)], ids=["conv", "transposed"])
def test_batch_norm_before_a_padded_convolution_stays(layer: nn.Module) -> None:
    report = folded(nn.Sequential(nn.BatchNorm2d(3), layer), X)
    assert rewrites(report) == 0 and report.ops_left["batch_norm"] == 1
    assert any(reason.startswith("requirement not met: The layer pads nothing") for _, reason in refusals(report))


def test_batch_norm_before_a_convolution_without_padding_folds() -> None:
    report = folded(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), X)
    assert rewrites(report) == 1 and "batch_norm" not in report.ops_left
