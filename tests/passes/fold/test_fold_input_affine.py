"""Folding constants before a layer into it: it rewrites, it refuses, the numbers agree, the numbers have teeth."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes import CATALOGUE, Rule, rule_pass
from passes.fold import affine
from tests.check import assert_sites_can_be_skipped, captured
from tests.layers import (
    LAYERS,
    OVERLAPPING,
    PADDED,
    SHIFTED,
    Around,
    check_folds,
    input_channels,
    layer_and_input,
    per_channel,
    refusals,
)

fold_input_affine = CATALOGUE["fold_input_affine"]
source = importlib.import_module("passes.fold.fold_input_affine")

SCALES: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "times": lambda layer, x, c: layer(x * c),
    "times, left": lambda layer, x, c: layer(c * x),
    "times a number": lambda layer, x, c: layer(x * 0.25),
    "over": lambda layer, x, c: layer(x / c),
    "over a number": lambda layer, x, c: layer(x / 255),
    "negative": lambda layer, x, c: layer(-x),
}
SHIFTS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "plus": lambda layer, x, c: layer(x + c),
    "plus, left": lambda layer, x, c: layer(c + x),
    "plus a number": lambda layer, x, c: layer(x + 2),
    "plus, scaled": lambda layer, x, c: layer(torch.add(x, c, alpha=3)),
    "minus": lambda layer, x, c: layer(x - c),
    "minus, scaled": lambda layer, x, c: layer(torch.sub(x, c, alpha=3)),
    "from": lambda layer, x, c: layer(c - x),
    "from a number": lambda layer, x, c: layer(1 - x),
    "normalised": lambda layer, x, c: layer((x / 255 - 0.5) / c),
}


def model_of(function: str, layer: nn.Module) -> Around:
    return Around((SCALES | SHIFTS)[function], layer, per_channel(layer, input_channels(layer)))


@pytest.mark.parametrize("function", SCALES)
@pytest.mark.parametrize("name", LAYERS)
def test_scales_fold_into_every_layer(name: str, function: str) -> None:
    layer, x = layer_and_input(name)
    check_folds(fold_input_affine, model_of(function, layer), x)


@pytest.mark.parametrize("function", SHIFTS)
@pytest.mark.parametrize("name", SHIFTED)
def test_shifts_fold_where_nothing_is_padded(name: str, function: str) -> None:
    layer, x = layer_and_input(name)
    check_folds(fold_input_affine, model_of(function, layer), x)


@pytest.mark.parametrize("frontend", ["export", "fx"])
def test_it_folds_through_other_front_ends(frontend: str) -> None:
    layer, x = layer_and_input("conv2d, grouped")
    check_folds(fold_input_affine, model_of("normalised", layer), x, frontend=frontend)


def test_a_scale_alone_brings_no_bias() -> None:
    conv = nn.Conv2d(3, 4, 3, bias=False).double()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    after = fold_input_affine(captured(Around(SCALES["times"], conv, torch.rand(3, 1, 1).double()).eval(), x))
    assert len(after.constants) == 1


# -- it refuses ---------------------------------------------------------------------------------------------------------

PER_CHANNEL = "requirement not met: The constant is one number, or one number per input channel."
WIDENED = "requirement not met: The layer's input has the shape and dtype of the value that is scaled or shifted."
PADS = "requirement not met: The layer pads nothing, so that every output sees a whole window of its input."
times = SCALES["times"]


@pytest.mark.parametrize("function", [name for name in SHIFTS if name != "normalised"])
@pytest.mark.parametrize("name", [*PADDED, *OVERLAPPING])
def test_a_shift_before_a_padded_layer_is_refused(name: str, function: str) -> None:
    """Zeros that are padded are not shifted; of an overlapping transposed convolution the border sees part of a window."""
    layer, x = layer_and_input(name)
    assert refusals(fold_input_affine, model_of(function, layer), x) == [PADS]


@pytest.mark.parametrize("shape", [(7,), (2, 1, 1, 1), (2, 4, 7, 7), (7, 7)], ids=str)
def test_a_constant_along_another_axis_is_refused(shape: tuple[int, ...]) -> None:
    model = Around(times, nn.Conv2d(4, 6, 3), torch.randn(shape))
    assert refusals(fold_input_affine, model, torch.randn(2, 4, 7, 7)) == [PER_CHANNEL]


def test_a_widened_input_is_refused() -> None:
    one_to_four = Around(times, nn.Conv2d(4, 6, 3), torch.randn(4, 1, 1))
    assert refusals(fold_input_affine, one_to_four, torch.randn(2, 1, 7, 7)) == [WIDENED]
    pictures = Around(SCALES["over a number"], nn.Conv2d(4, 6, 3))
    assert refusals(fold_input_affine, pictures, torch.randint(255, (2, 4, 7, 7), dtype=torch.uint8)) == [WIDENED]
    promoted = Around(times, nn.Linear(4, 6).double(), torch.randn(4).double())
    assert refusals(fold_input_affine, promoted, torch.randn(3, 4)) == [WIDENED]


def test_what_would_not_be_finite_is_refused() -> None:
    model = Around(SCALES["over"], nn.Linear(3, 2), torch.tensor([1.0, 0.0, 2.0]))
    assert refusals(fold_input_affine, model, torch.rand(2, 3)) == ["the folded weight or bias would not be finite"]


def test_a_second_user_of_the_scaled_input_is_refused() -> None:
    both = Around(lambda layer, x, c: (lambda y: layer(y) + y)(x * 2), nn.Linear(4, 4))
    (reason,) = refusals(fold_input_affine, both, torch.rand(2, 4))
    assert "has another user (add" in reason


def test_each_site_can_be_skipped() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 2)])
    model = Around(lambda layers, x, c: layers[1](layers[0](x * 2).exp() + 1), layers)
    x = torch.randn(2, 4)
    assert_sites_can_be_skipped(fold_input_affine, lambda: captured(model.eval(), x), x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function, name, broken",
    [
        ("times", "scaled_inputs", lambda layer, w, s: w.double()),
        ("times", "scaled_inputs", lambda layer, w, s: w.double() * s.flip(0).reshape(1, -1, 1, 1)),
        ("plus", "layer_sum", lambda layer, w, t: w.double()[:, :, 0, 0] @ t),
        ("plus", "layer_sum", lambda layer, w, t: torch.zeros(w.shape[0], dtype=torch.float64)),
        ("plus, scaled", "AFFINE", {**affine.AFFINE, "y + c": lambda step, c: (None, c)}),
        ("minus", "AFFINE", {**affine.AFFINE, "y - c": affine.AFFINE["y + c"]}),
    ],
    ids=["unscaled", "other channels", "one tap", "no shift", "no alpha", "plus"],
)
def test_broken_arithmetic_is_noticed(function: str, name: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_and_input("conv2d, square")
    monkeypatch.setattr(affine if name == "AFFINE" else source, name, broken)
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(fold_input_affine, model_of(function, layer), x)


@pytest.mark.parametrize("name", [*PADDED, "conv_transpose2d"])
def test_folding_over_padding_would_be_noticed(name: str) -> None:
    rule = Rule("wrong", match=source.layer_of_sum, replace=source.folded("y + c"))
    layer, x = layer_and_input(name)
    with pytest.raises(AssertionError, match="relative error"):
        check_folds(rule_pass("wrong", [rule], effects={"rounds"}, doc=""), model_of("plus", layer), x)
