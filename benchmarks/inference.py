"""Inference latency side by side: eager, torch's own trace and freeze, and ours, in one run.

    python -m benchmarks.inference --model torchvision:resnet50 --model bert

Every round calls each variant once, so that all meet the same machine; the table holds medians and the ratio to eager
float32. Rows "freeze" are `torch.jit.freeze(torch.jit.trace(model))`, in bfloat16 with a channels-last input and weights for
convolutional nets, which is the best that stock torch writes into a file.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from passes import optimize
from passes.cli.sources import load_source
from passes.tune.timing import interleaved_seconds

MODELS = ("torchvision:resnet18", "torchvision:resnet50", "torchvision:mobilenet_v3_large", "timm:tf_efficientnet_b4", "bert")
HALF = ("fuse_conv_bn_relu", "cast_half")


def load(name: str, batch: int) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A model in eval mode and its arguments."""
    if name == "bert":
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        return BertModel(BertConfig(), add_pooling_layer=False).eval(), (torch.randint(0, 30522, (batch, 128)),)
    size = 380 if "efficientnet_b4" in name else 224
    model = load_source(name)
    assert isinstance(model, nn.Module)
    return model, (torch.randn(batch, 3, size, size),)


def frozen(model: nn.Module, args: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Callable[..., Any]:
    """A faster file by torch alone: trace and freeze, channels-last where the input is an image."""
    model = copy.deepcopy(model).to(dtype)
    if args[0].dim() == 4:
        model = model.to(memory_format=torch.channels_last)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.freeze(torch.jit.trace(model, converted(args, dtype), strict=False, check_trace=False))
    return lambda: traced(*converted(args, dtype))


def converted(args: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Float arguments in `dtype`, images channels-last: part of the call, as it is for ours."""

    def convert(t: torch.Tensor) -> torch.Tensor:
        t = t.to(dtype) if t.is_floating_point() else t
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    return tuple(convert(t) for t in args)


def variants(model: nn.Module, args: tuple[torch.Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; the first one is the reference."""
    ours = {
        "ours, float32": optimize(model, example_inputs=args),
        "ours, float32, aten": optimize(model, example_inputs=args, engine="aten"),
        "ours, bfloat16": optimize(model, HALF, example_inputs=args),
        "ours, bfloat16, aten": optimize(model, HALF, example_inputs=args, engine="aten"),
    }
    calls: dict[str, Callable[[], Any]] = {
        "eager, float32": lambda: model(*args),
        "freeze, float32": frozen(model, args, torch.float32),
        "freeze, bfloat16": frozen(model, args, torch.bfloat16),
    }
    for name, fast in ours.items():
        calls[name] = lambda fast=fast: fast(*args)  # type: ignore[misc]
    return calls


def main(
    model: Annotated[list[str], typer.Option(help="torchvision:NAME, timm:NAME or bert")] = list(MODELS),  # noqa: B006
    batch: Annotated[int, typer.Option(help="batch size")] = 1,
    seconds: Annotated[float, typer.Option(help="seconds of timing per model")] = 15.0,
) -> None:
    """Print median milliseconds and the ratio to eager float32 for every model and variant."""
    console = Console()
    for name in model:
        module, args = load(name, batch)
        times = interleaved_seconds(variants(module, args), seconds=seconds, least_rounds=9)
        rounds = len(next(iter(times.values())))
        table = Table(title=f"{name}, batch {batch}, {torch.get_num_threads()} threads, {rounds} interleaved rounds")
        for column in ("variant", "median ms", "fastest ms", "times faster than eager"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        eager = statistics.median(times["eager, float32"])
        for variant, values in times.items():
            median = statistics.median(values)
            table.add_row(variant, f"{median * 1e3:.2f}", f"{min(values) * 1e3:.2f}", f"{eager / median:.2f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
