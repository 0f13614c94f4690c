"""Folding constants behind a layer into it: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torchvision_ops import import_torchvision
from passes import CATALOGUE, Rule, rule_pass
from passes.fold import affine
from tests.check import assert_numbers_agree, assert_sites_can_be_skipped, captured, ops, rewritten, with_random_statistics
from tests.layers import EXACT, LAYERS, Around, check_folds, layer_and_input, output_channels, per_channel, refusals

fold_affine = CATALOGUE["fold_affine"]
source = importlib.import_module("passes.fold.fold_affine")

FUNCTIONS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "times": lambda layer, x, c: layer(x) * c,
    "times, left": lambda layer, x, c: c * layer(x),
    "times a number": lambda layer, x, c: layer(x) * -2.5,
    "over": lambda layer, x, c: layer(x) / c,
    "over a number": lambda layer, x, c: layer(x) / 3,
    "plus": lambda layer, x, c: layer(x) + c,
    "plus, left": lambda layer, x, c: c + layer(x),
    "plus, scaled": lambda layer, x, c: torch.add(layer(x), c, alpha=3),
    "minus": lambda layer, x, c: layer(x) - c,
    "minus, scaled": lambda layer, x, c: torch.sub(layer(x), c, alpha=0.5),
    "from": lambda layer, x, c: c - layer(x),
    "from, scaled": lambda layer, x, c: torch.sub(c, layer(x), alpha=3),
    "from a number": lambda layer, x, c: 1 - layer(x),
    "negative": lambda layer, x, c: -layer(x),
    "chain": lambda layer, x, c: (2 - (layer(x) * c + c) * c) / c,
}


def model_of(function: str, layer: nn.Module) -> Around:
    return Around(FUNCTIONS[function], layer, per_channel(layer, output_channels(layer)))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_it_folds(name: str, function: str) -> None:
    layer, x = layer_and_input(name)
    check_folds(fold_affine, model_of(function, layer), x)


@pytest.mark.parametrize("frontend", ["export", "script", "fx"])
@pytest.mark.parametrize("function", ["chain", "from a number", "from, scaled"])
def test_it_folds_through_every_front_end(function: str, frontend: str) -> None:
    layer, x = layer_and_input("conv2d")
    model = model_of(function, layer).double().eval()
    if frontend == "script":
        check_folds(fold_affine, torch.jit.trace(model, x), x, frontend="script")
    else:
        check_folds(fold_affine, model, x, frontend=frontend)


def test_chains_with_batch_norms_fold_in_whatever_order() -> None:
    conv, bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.a, self.b = conv, bn, nn.BatchNorm2d(4)
            self.register_buffer("c", torch.rand(4, 1, 1) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(self.conv(x) * self.c) / 3 + self.c) - 1

    model, x = with_random_statistics(Chain()).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert len(check_folds(fold_affine, model, x).rewrites) == 6


def test_torchvisions_frozen_batch_norm_folds() -> None:
    """Its scale and its bias follow from buffers alone: they are computed now, and fold."""
    frozen = import_torchvision().ops.FrozenBatchNorm2d(4)
    for buffer in frozen.buffers():
        buffer.uniform_(0.2, 2.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), frozen).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for frontend in ("export", "trace", "fx"):
        program = CATALOGUE["fold_constants"](captured(model, x, frontend=frontend))
        after, log = rewritten(fold_affine, program, x)
        assert ops(after) == ["conv2d"] and len(log.rewrites) == 2
        assert_numbers_agree(model, after, x, within=EXACT)


@pytest.mark.parametrize(
    "normed",
    [nn.utils.weight_norm, parametrizations.weight_norm, nn.utils.spectral_norm, parametrizations.spectral_norm],
    ids=["weight_norm hook", "weight_norm", "spectral_norm hook", "spectral_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3), nn.Linear(6, 4), nn.ConvTranspose2d(3, 4, 3)])
@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_parametrised_weights_fold_when_frozen(normed: Callable, layer: nn.Module, frontend: str) -> None:
    """The weight follows from constants: it is computed now, and what stands behind the layer folds into it."""
    model = Around(FUNCTIONS["times a number"], normed(copy.deepcopy(layer)).double()).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = CATALOGUE["fold_constants"](captured(model, x, frontend=frontend))
    after, _ = rewritten(fold_affine, program, x)
    assert len(after.calls) == 1, ops(after)
    assert_numbers_agree(model, after, x, within=EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_keep_their_dtype(dtype: torch.dtype) -> None:
    model = Around(FUNCTIONS["times"], nn.Conv2d(3, 4, 3), torch.rand(4, 1, 1) + 0.5).to(dtype).eval()
    x = torch.randn(2, 3, 6, 6, dtype=dtype)
    after, _ = rewritten(fold_affine, captured(model, x), x)
    assert ops(after) == ["conv2d"] and {t.dtype for t in after.constants.values()} == {dtype}
    assert_numbers_agree(model, after, x, within=8 * torch.finfo(dtype).eps)


# -- it refuses ---------------------------------------------------------------------------------------------------------

PER_CHANNEL = "requirement not met: The constant is one number, or one number per output channel."
times = FUNCTIONS["times"]


@pytest.mark.parametrize("c", [torch.randn(7, 5), torch.randn(5), torch.randn(1, 5), torch.randn(2, 1, 1, 1),
                               torch.randn(2, 6, 7, 5), torch.randn(6, 7, 1)], ids=lambda c: str(list(c.shape)))  # fmt: skip
def test_a_constant_along_another_axis_is_refused(c: Tensor) -> None:
    assert refusals(fold_affine, Around(times, nn.Conv2d(4, 6, 3, padding=1), c), torch.randn(2, 4, 7, 5)) == [PER_CHANNEL]


def test_the_channels_of_a_linear_are_last() -> None:
    model = Around(times, nn.Linear(4, 6), torch.randn(6, 1))
    assert refusals(fold_affine, model, torch.randn(6, 4)) == [PER_CHANNEL]
    check_folds(fold_affine, Around(times, nn.Linear(4, 6).double(), torch.randn(6).double()), torch.randn(6, 4).double())


def test_an_unbatched_convolution_folds_along_its_own_channels() -> None:
    """(6, 1, 1) is per channel, (6, 1) is not, although the picture is six high."""
    conv, x = nn.Conv2d(4, 6, 3, padding=1).double(), torch.randn(4, 6, 6).double()
    check_folds(fold_affine, Around(times, conv, torch.randn(6, 1, 1).double()), x, frontend="export")
    assert refusals(fold_affine, Around(times, conv, torch.randn(6, 1).double()), x) == [PER_CHANNEL]


def test_a_constant_that_widens_the_result_is_refused() -> None:
    x = torch.randn(2, 4, 7, 7)
    one_channel = Around(times, nn.Conv2d(4, 1, 3), torch.randn(6, 1, 1))
    assert refusals(fold_affine, one_channel, x) == [PER_CHANNEL]
    more_axes = Around(times, nn.Conv2d(4, 6, 3), torch.randn(1, 1, 1, 1, 1))
    (reason,) = refusals(fold_affine, more_axes, x)
    assert reason.startswith("the result would change shape")
    wider = Around(times, nn.Conv2d(4, 6, 3), torch.randn(6, 1, 1, dtype=torch.float64))
    (reason,) = refusals(fold_affine, wider, x)
    assert reason.startswith("the result would change dtype")


def test_what_would_not_be_finite_is_refused() -> None:
    x, c = torch.randn(2, 4, 7, 7), torch.tensor([1.0, 2, 0, 4, 5, 6]).reshape(6, 1, 1)
    NOT_FINITE = "the folded weight or bias would not be finite"
    assert refusals(fold_affine, Around(FUNCTIONS["over"], nn.Conv2d(4, 6, 3), c), x) == [NOT_FINITE]
    assert refusals(fold_affine, Around(times, nn.Conv2d(4, 6, 3), 1 / c), x) == [NOT_FINITE]
    overflows = Around(times, nn.Conv2d(4, 6, 3).half(), torch.tensor(60000.0)).half()
    with torch.no_grad():
        overflows.layer.weight[0] = 2.0
    assert refusals(fold_affine, overflows, (x * 1e-3).half()) == [NOT_FINITE]


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128])
def test_weights_that_are_not_floating_are_refused(dtype: torch.dtype) -> None:
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.arange(12).reshape(3, 4).to(dtype) * (1 + (1j if dtype.is_complex else 0)))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w) * 2

    reasons = refusals(fold_affine, Plain(), torch.ones(2, 4, dtype=dtype))
    assert reasons == ["the weight is not of a floating dtype"]


def test_a_weight_of_one_axis_is_no_layer() -> None:
    """`linear` gives one number per row then; its weight has no output channels."""

    class Row(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4))
            self.register_buffer("c", torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.w) * self.c

    for frontend in ("trace", "export", "script"):
        model, x = Row().eval(), torch.randn(4, 4)
        program = captured(torch.jit.script(model) if frontend == "script" else model, x, frontend=frontend)
        assert ops(program) == ["matmul", "mul"] and fold_affine(program) is program
        assert_numbers_agree(model, program, x, within=0)


def test_other_divisions_and_run_time_values_do_not_match() -> None:
    x = torch.randn(2, 4, 7, 7)
    floor = Around(lambda layer, x, c: torch.div(layer(x), c, rounding_mode="floor"), nn.Conv2d(4, 6, 3), torch.tensor(2.0))
    assert refusals(fold_affine, floor, x) == []
    gate = Around(lambda layer, x, c: layer(x) * x.mean(), nn.Conv2d(4, 6, 3))
    assert refusals(fold_affine, gate, x) == []
    scaled_layer = Around(lambda layer, x, c: torch.add(c, layer(x), alpha=2), nn.Conv2d(4, 6, 3), torch.tensor(2.0))
    assert refusals(fold_affine, scaled_layer, x) == []


def test_a_second_user_and_a_runtime_weight_are_refused() -> None:
    x = torch.randn(2, 4, 7, 7)
    both = Around(lambda layer, x, c: (lambda y: y * 2 + y.exp())(layer(x)), nn.Conv2d(4, 6, 3))
    (reason,) = refusals(fold_affine, both, x)
    assert "has another user (exp" in reason
    run = Around(lambda layer, x, c: torch.nn.functional.conv2d(x, x[:, :, :3, :3]) * 2, nn.Identity())
    assert refusals(fold_affine, run, x) == ["known at run time only: w"]


def test_folds_compute_where_the_weight_is() -> None:
    """Plain numbers are on no device: what is made of them must be on that of the weight."""
    folding = importlib.import_module("passes.fold.arithmetic")
    with FakeTensorMode():
        w = torch.empty(4, 3, 2, 2, device="cuda")
        layer = SimpleNamespace(target=torch.ops.aten.conv2d.default, groups=1)
        s, t = folding.per_channel(2.0, 4, w), folding.per_channel(0.5, 3, w)
        assert folding.scaled_outputs(layer, w, s).device == w.device == folding.layer_sum(layer, w, t).device
        assert folding.scaled_inputs(layer, w, t).device == w.device


def test_each_site_can_be_skipped() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * 2).relu().mean((2, 3))) + 3

    model, x = Two().eval(), torch.randn(2, 3, 6, 6)
    assert_sites_can_be_skipped(fold_affine, lambda: captured(model, x), x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------

RIGHT = {name: getattr(source, name) for name in ("scaled_outputs", "per_channel")}
SABOTAGES: dict[str, tuple[str, str, object]] = {
    "the weight is left": ("times", "scaled_outputs", lambda layer, w, s: w.double()),
    "alpha is lost": ("plus, scaled", "AFFINE", {**affine.AFFINE, "y + c": lambda step, c: (None, c)}),
    "a sum for a difference": ("minus", "AFFINE", {**affine.AFFINE, "y - c": affine.AFFINE["y + c"]}),
    "the sign is lost": ("from", "scaled_outputs", lambda layer, w, s: w.double() * 1),
    "in float32": ("times", "scaled_outputs", lambda layer, w, s: RIGHT["scaled_outputs"](layer, w, s.float())),
}  # fmt: skip


def per_one(scale: Tensor | float, w: Tensor) -> Tensor:
    return RIGHT["per_channel"](scale, w.shape[0], w)


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_broken_arithmetic_is_noticed(sabotage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, name, broken = SABOTAGES[sabotage]
    layer, x = layer_and_input("conv2d")
    monkeypatch.setattr(affine if name == "AFFINE" else source, name, broken)
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(fold_affine, model_of(function, layer), x)


def test_a_bias_that_is_left_is_noticed() -> None:
    def bias_left(op, layer, x, w, b, scale, shift):
        return source.affine(op, layer, x, w, b / per_one(scale, w), scale, shift)

    replace = affine.right_side(bias_left, source.output_channels, "y * c")
    rule = Rule("wrong", match=source.layer_times_constant, replace=replace)
    layer, x = layer_and_input("conv2d")
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(rule_pass("wrong", [rule], effects={"rounds"}, doc=""), model_of("times", layer), x)


def test_a_product_for_a_quotient_is_noticed() -> None:
    rule = Rule("wrong", match=source.layer_over_constant, replace=source.folded("y * c"))
    layer, x = layer_and_input("conv2d")
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(rule_pass("wrong", [rule], effects={"rounds"}, doc=""), model_of("over", layer), x)
