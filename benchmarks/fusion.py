"""What each folding and fusing pass is worth: the default pipeline with and without it, side by side, in one run.

    python -m benchmarks.fusion
    python -m benchmarks.fusion --only chains --seconds 5

Every row is a model that the pass has work on. Both files are called in turn (`passes.tune.timing`); "times faster" is the
median without the pass over the median with it. Numbers only, no assertions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from passes import DEFAULT, optimize
from passes.tune.timing import compare_latency

Made = tuple[nn.Module, tuple[Tensor, ...]]


class Attention(nn.Module):
    """Attention written out by hand, 12 heads of 64: query, key and value are linears of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(768, 768) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (12, 64)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / 8, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Scaled(nn.Module):
    """Convolutions between constants per channel, as a frozen batch norm leaves them."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.convs = nn.ModuleList(nn.Conv2d(64, 64, 3, bias=False) for _ in range(4))
        self.register_buffer("scale", torch.rand(64, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(64, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x * self.scale + self.shift) if self.before else conv(x) * self.scale + self.shift
            x = torch.relu(x)
        return x


class NormFirst(nn.Module):
    """Batch norms before unpadded convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.BatchNorm2d(64), nn.Conv2d(64, 64, 3), nn.ReLU()) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def resnet18() -> Made:
    from ir_tools.torchvision_ops import import_torchvision

    return import_torchvision().models.resnet18(weights=None).eval(), (torch.randn(1, 3, 224, 224),)


def picture(module: nn.Module) -> Made:
    return module.eval(), (torch.randn(1, 64, 56, 56),)


def linears(*sizes: int) -> Made:
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*layers).eval(), (torch.randn(128, sizes[0]),)


def pointwise_chain() -> Made:
    return picture(nn.Sequential(nn.Conv2d(64, 128, 1), nn.Conv2d(128, 64, 3), nn.Conv2d(64, 64, 1), nn.ReLU()))


def attention(tokens: int) -> Callable[[], Made]:
    return lambda: (Attention().eval(), (torch.randn(1, tokens, 768),))


ROWS: tuple[tuple[str, str, Callable[[], Made]], ...] = (
    ("fuse_conv_bn", "ResNet-18, 224x224", resnet18),
    ("fuse_conv_relu", "ResNet-18, 224x224", resnet18),
    ("fold_affine", "4 x (conv, scale, shift, relu)", lambda: picture(Scaled(before=False))),
    ("fold_input_affine", "4 x (scale, shift, conv, relu)", lambda: picture(Scaled(before=True))),
    ("fuse_bn_conv", "4 x (batch norm, conv, relu)", lambda: picture(NormFirst())),
    ("merge_linear_chains", "linear 1024-1024-1024, 128 rows", lambda: linears(1024, 1024, 1024)),
    ("merge_linear_chains", "linear 256-1024-256, 128 rows", lambda: linears(256, 1024, 256)),
    ("merge_linear_chains", "conv 1x1, 3x3, 1x1", pointwise_chain),
    ("merge_parallel_linears", "attention, 128 tokens", attention(128)),
    ("fuse_attention", "attention, 128 tokens", attention(128)),
    ("fuse_attention", "attention, 1024 tokens", attention(1024)),
)
"""Pass, what the model is, the model."""


def with_and_without(name: str) -> tuple[list[str], list[str]]:
    """The default pipeline with the pass, at its usual position, and without it; lowering fuses without measuring."""
    lowering = "lower_onednn:variant=fused"
    at = DEFAULT.index("fuse_attention")
    full = [*DEFAULT] if name in DEFAULT else [*DEFAULT[:at], name, *DEFAULT[at:]]
    left_out = {name, "fold_affine"} if name == "fuse_conv_bn" else {name}  # which folds batch norms as well
    return [*full, lowering], [*(other for other in full if other not in left_out), lowering]


def main(
    only: Annotated[str, typer.Option(help="Part of a pass's name.")] = "",
    seconds: Annotated[float, typer.Option(help="Of timing, for each row.")] = 3.0,
    half: Annotated[bool, typer.Option(help="In bfloat16.")] = False,
) -> None:
    table = Table()
    for column in ("pass", "model", "rewrites", "ms without", "ms with", "times faster"):
        table.add_column(column, justify="left" if column in ("pass", "model") else "right")
    for name, what, make in ROWS:
        if only not in name:
            continue
        torch.manual_seed(0)
        model, inputs = make()
        if half:
            model, inputs = model.bfloat16(), tuple(x.bfloat16() for x in inputs)
        having, lacking = with_and_without(name)
        after, before = (optimize(model, passes, example_inputs=inputs) for passes in (having, lacking))
        rewrites = sum(len(step.rewrites) for step in after.report.steps if step.name == name)
        timing = compare_latency(before, after, inputs, seconds=seconds)
        figures = (f"{timing.before * 1e3:.3f}", f"{timing.after * 1e3:.3f}", f"{timing.ratio:.2f}")
        table.add_row(name, what, str(rewrites), *figures)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
