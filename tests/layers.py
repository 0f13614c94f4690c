"""Every kind of layer that folds take, and a module that puts any function around one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ir_tools.rewrite import Pass, RewriteLog
from tests.check import assert_numbers_agree, captured, ops, rewritten

EXACT = 1e-10
"""Relative error allowed to a fold in float64."""

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, 2), (2, 4, 7, 7)),
    "conv2d, padded": (lambda: nn.Conv2d(4, 6, 3, 2, padding=(0, 1)), (2, 4, 7, 7)),
    "conv2d, dilated, no bias": (lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False), (2, 4, 7, 7)),
    "conv2d, square": (lambda: nn.Conv2d(4, 4, 3), (2, 4, 4, 4)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 4, 4)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 5)),
    "conv_transpose2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "conv_transpose2d, depthwise": (lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), (2, 4, 5, 5)),
    "conv_transpose2d, 1x1": (lambda: nn.ConvTranspose2d(4, 6, 1, groups=2), (2, 4, 5, 5)),
    "conv_transpose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "linear": (lambda: nn.Linear(4, 6), (3, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 4, bias=False), (3, 4)),
    "linear, three axes": (lambda: nn.Linear(4, 6), (3, 5, 4)),
    "linear, one axis": (lambda: nn.Linear(4, 6), (4,)),
}

PADDED = ("conv1d", "conv2d, padded")
OVERLAPPING = tuple(name for name in LAYERS if name.startswith("conv_transpose") and "1x1" not in name)
SHIFTED = tuple(name for name in LAYERS if name not in (*PADDED, *OVERLAPPING))
"""Layers through which a shift of the input can be folded."""


class Around(nn.Module):
    """`function(layer, x, c)`, any function, with a buffer c."""

    def __init__(self, function: Callable[..., Tensor], layer: nn.Module, c: Tensor | None = None):
        super().__init__()
        self.function, self.layer = function, layer
        self.register_buffer("c", c)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer, x, self.c)


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    """A layer and an input for it, float64."""
    build, shape = LAYERS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


def per_channel(layer: nn.Module, channels: int) -> Tensor:
    """A constant with one number per channel, as it broadcasts against the layer's input and output; none is near zero."""
    values = torch.rand(channels, dtype=torch.float64) + 0.5
    signs = torch.randint(2, (channels,)) * 2 - 1
    return (values * signs).reshape(channels, *[1] * (layer.weight.dim() - 2))


def input_channels(layer: nn.Module) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def output_channels(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def check_folds(pass_: Pass, model: nn.Module, x: Tensor, *, left: int = 1, frontend: str = "trace") -> RewriteLog:
    """Everything folds, so that only `left` ops stay, and the numbers agree."""
    program = captured(model.eval(), x, frontend=frontend)
    after, log = rewritten(pass_, program, x)
    assert len(after.calls) == left, (ops(after), log.refusals)
    assert_numbers_agree(model, after, x, within=EXACT)
    return log


def refusals(pass_: Pass, model: nn.Module, *inputs: Tensor, frontend: str = "export") -> list[str]:
    """The reasons for which the pass leaves `model` alone."""
    program = captured(model.eval(), *inputs, frontend=frontend)
    after, log = rewritten(pass_, program, *inputs)
    assert after is program and not log.rewrites
    return [refused.reason for refused in log.refusals]
