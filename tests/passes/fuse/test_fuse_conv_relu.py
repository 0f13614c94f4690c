"""Fusing activations and residual additions into convolutions and linears."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.ir.dialect import argument
from passes import CATALOGUE
from tests.check import assert_bitwise_equal, assert_sites_can_be_skipped, captured, ops, outputs_of, rewritten

fuse_conv_relu = CATALOGUE["fuse_conv_relu"]
source = importlib.import_module("passes.fuse.fuse_conv_relu")

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str, list[float]]] = {
    "relu": (F.relu, "relu", []),
    "relu6": (F.relu6, "hardtanh", [0.0, 6.0]),
    "hardtanh": (lambda y: F.hardtanh(y, -0.25, 0.5), "hardtanh", [-0.25, 0.5]),
    "leaky_relu": (lambda y: F.leaky_relu(y, 0.375), "leaky_relu", [0.375]),
    "hardswish": (F.hardswish, "hardswish", []),
    "silu": (F.silu, "silu", []),
    "sigmoid": (torch.sigmoid, "sigmoid", []),
    "tanh": (torch.tanh, "tanh", []),
    "gelu": (F.gelu, "gelu", []),
    "gelu_tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh", []),
}
"""name -> (function, name in the dialect, arguments in the dialect)."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, dilation=2), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 3, 3)),
    "linear": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 4, bias=False), (5,)),
}


class Block(nn.Module):
    """act(layer(x)), act(layer(x) + r) or act(r + layer(x)); `residual` is "", "right" or "left"."""

    def __init__(self, layer: nn.Module, act: Callable[[Tensor], Tensor] = lambda y: y, residual: str = ""):
        super().__init__()
        self.layer, self.act, self.residual = layer, act, residual

    def forward(self, x: Tensor, r: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        if self.residual:
            y = y + r if self.residual == "right" else r + y
        return self.act(y)


def block(layer: str, act: str = "", residual: str = "") -> tuple[Block, tuple[Tensor, ...]]:
    build, shape = LAYERS[layer]
    model = Block(build(), ACTIVATIONS[act][0] if act else lambda y: y, residual).eval()
    # Wide enough that every branch of every activation is taken.
    x = 4 * torch.randn(shape)
    with torch.no_grad():
        r = (4 * torch.randn_like(model.layer(x)),) if residual else ()
    return model, (x, *r)


def check_fusion(model: nn.Module, *inputs: Tensor):
    """Everything ends in one fused op, bitwise equal to the model's own ops. Returns that op's node."""
    program = captured(model, *inputs)
    after, log = rewritten(fuse_conv_relu, program, *inputs)
    assert log.rewrites and not log.refusals
    (node,) = after.calls
    assert_bitwise_equal(outputs_of(program, *inputs), outputs_of(after, *inputs))
    return node


# -- it rewrites, and the numbers agree ---------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_an_activation_is_fused_with_its_arguments(layer: str, act: str) -> None:
    model, inputs = block(layer, act)
    node = check_fusion(model, *inputs)
    _, name, values = ACTIVATIONS[act]
    assert (argument(node, "act"), argument(node, "act_args"), argument(node, "residual")) == (name, values, None)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("act", ["", *ACTIVATIONS])
@pytest.mark.parametrize("layer", ["conv2d", "linear"])
def test_a_residual_is_fused_from_either_side(layer: str, act: str, side: str) -> None:
    model, inputs = block(layer, act, side)
    node = check_fusion(model, *inputs)
    assert argument(node, "residual").op == "placeholder"
    assert argument(node, "act") == (ACTIVATIONS[act][1] if act else "")


def test_a_residual_of_another_layout_is_fused_where_the_layer_leads() -> None:
    model, (x, r) = block("conv2d", "relu", "right")
    r = r.contiguous(memory_format=torch.channels_last)
    program = captured(model, x, r)
    after, _ = rewritten(fuse_conv_relu, program, x, r)
    assert ops(after) == ["conv_act"] and outputs_of(after, x, r)[0].stride() == outputs_of(program, x, r)[0].stride()


def test_the_layers_arguments_are_kept() -> None:
    model, (x,) = block("conv2d", "relu")
    node = check_fusion(model, x)
    assert [argument(node, a) for a in ("stride", "padding", "dilation", "groups")] == [[2, 2], [1, 1], [1, 1], 2]


def test_two_convs_are_added_as_one_fused_op_and_its_residual() -> None:
    class TwoConvs(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + self.b(x))

    model, x = TwoConvs().eval(), torch.randn(2, 3, 6, 6)
    program = captured(model, x)
    after, _ = rewritten(fuse_conv_relu, program, x)
    assert ops(after) == ["conv2d", "conv_act"]
    assert_bitwise_equal(outputs_of(program, x), outputs_of(after, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_fuse_bitwise(dtype: torch.dtype) -> None:
    for act in ("gelu_tanh", "leaky_relu"):
        model, inputs = block("conv2d", act, "right")
        check_fusion(model.to(dtype), *(t.to(dtype) for t in inputs))


def test_an_integer_linear_fuses_bitwise() -> None:
    class Integers(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("w", torch.randint(-5, 5, (4, 5)))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, self.w))

    check_fusion(Integers(), torch.randint(-5, 5, (3, 5)))


def test_the_activation_after_the_first_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sigmoid()).eval()
    after, _ = rewritten(fuse_conv_relu, captured(model, x := torch.randn(1, 3, 6, 6)), x)
    assert ops(after) == ["conv_act", "sigmoid"]


# -- it refuses ---------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """`function(layer(x), r)`, with any function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], layer: nn.Module):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        return self.function(self.layer(x), r)


SHAPE = "requirement not met: The two summands have the shape and dtype of the sum (nothing is broadcast or promoted)."
ALPHA = "requirement not met: The addition has alpha = 1."
LAYOUT = "the result would lie in memory in another order"
FULL = (2, 4, 6, 6)
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor, str]] = {
    "broadcast residual": (lambda y, r: y + r, torch.randn(1, 4, 1, 1), SHAPE),
    "broadcast residual, left": (lambda y, r: r + y, torch.randn(4, 1, 1), SHAPE),
    "broadcast convolution": (lambda y, r: y + r, torch.randn(3, *FULL), SHAPE),
    "broadcast convolution, left": (lambda y, r: r + y, torch.randn(3, *FULL), SHAPE),
    "wider residual": (lambda y, r: y + r, torch.randn(FULL, dtype=torch.float64), SHAPE),
    "one element": (lambda y, r: y + r, torch.randn(()), SHAPE),
    "integer residual": (lambda y, r: y + r, torch.ones(FULL, dtype=torch.int64), SHAPE),
    "scaled residual": (lambda y, r: torch.add(y, r, alpha=2), torch.randn(FULL), ALPHA),
    "another layout, left": (lambda y, r: r + y, torch.randn(FULL).contiguous(memory_format=torch.channels_last), LAYOUT),
    "summand read twice": (lambda y, r: y + r + y.exp(), torch.randn(FULL), "another user (exp exp)"),
    "activated summand read twice": (lambda y, r: F.relu(y) + r * y, torch.randn(FULL), "another user (mul mul)"),
    "summand written in place": (lambda y, r: (r.mul_(2.0), y + r)[1], torch.randn(FULL), "is written in place"),
    "the same value twice": (lambda y, r: (y + y) * r, torch.randn(FULL), "is read twice by the pattern"),
}


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 6)], ids=["conv", "linear"])
@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(case: str, layer: nn.Module) -> None:
    function, r, reason = REFUSED[case]
    x = torch.randn(2, 3 if isinstance(layer, nn.Conv2d) else 4, 6, 6)
    model = Sum(function, layer).eval()
    program = captured(model, x, r)
    after, log = rewritten(fuse_conv_relu, program, x, r)
    assert after is program
    assert log.refusals and all(refused.reason.endswith(reason) for refused in log.refusals)


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 6)], ids=["conv", "linear"])
def test_a_scaled_convolution_is_no_summand(layer: nn.Module) -> None:
    """A sum may be read in either order only where neither summand is scaled."""
    x, r = torch.randn(2, 3 if isinstance(layer, nn.Conv2d) else 4, 6, 6), torch.randn(FULL)
    program = captured(Sum(lambda y, r: torch.add(r, y, alpha=0.5), layer).eval(), x, r)
    assert rewritten(fuse_conv_relu, program, x, r)[0] is program


# -- sites --------------------------------------------------------------------------------------------------------------


def test_each_site_can_be_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Linear(4, 2), nn.SiLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    assert_sites_can_be_skipped(fuse_conv_relu, lambda: captured(model, x), x)


# -- the numbers have teeth ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", ["hardtanh", "leaky_relu"])
def test_lost_arguments_are_noticed(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = {"hardtanh": [-1.0, 1.0], "leaky_relu": [0.01]}
    monkeypatch.setattr(source, "arguments_of", lambda call: (act, defaults[act]))
    model, inputs = block("conv2d", act)
    with pytest.raises(AssertionError, match="moved by"):
        check_fusion(model, *inputs)


def test_the_wrong_gelu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "arguments_of", lambda call: ("gelu", []))
    model, inputs = block("linear", "gelu_tanh")
    with pytest.raises(AssertionError, match="moved by"):
        check_fusion(model, *inputs)


def test_a_lost_activation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "arguments_of", lambda call: ("", []))
    for residual in ("", "left"):
        model, inputs = block("conv2d", "sigmoid", residual)
        with pytest.raises(AssertionError, match="moved by"):
            check_fusion(model, *inputs)
