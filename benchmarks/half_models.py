"""What `benchmarks.half` compares on: the five seed cases of half precision, and the sample of the zoo.

Weights are random but for the checkerboard's, and the same on every run. Norms have random statistics, scales and shifts near
the ordinary ones (`randomize_batch_norms`): fresh ones would do nothing, and wider ones would make activations explode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_models import SAMPLE, Entry, randomize_zeros, read_list
from ir_tools.torchvision_ops import import_torchvision
from passes.cli.example_inputs import SEED

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""
INPUTS = 4
"""Calls that noise is averaged over."""


@dataclass
class Case:
    """A model and its calls; `target` is what a trained model should answer to the one call it has."""

    title: str
    model: nn.Module
    calls: list[Call]
    target: Tensor | None = None

    @property
    def takes_images(self) -> bool:
        """The first argument is [batch, channels, height, width], so that there are two layouts to compare."""
        return bool(self.calls[0][0]) and self.calls[0][0][0].dim() == 4


def from_entry(entry: Entry, title: str) -> Case:
    model = entry.build()
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(SEED)
        for module in model.modules():
            if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
    return Case(title, model, [entry.arguments(SEED + i) for i in range(INPUTS)])


def image_net(source: str, name: str, size: int) -> Callable[[], Case]:
    entry = Entry(source, name, {}, (f"1x3x{size}x{size}",))
    return lambda: from_entry(entry, f"{name} ({source}), 1x3x{size}x{size}")


def bert() -> Case:
    import_torchvision()
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        model = BertModel(BertConfig(), add_pooling_layer=False).eval()
        randomize_zeros(model)
        tokens = torch.randint(0, BertConfig().vocab_size, (INPUTS, 1, 128))
    return Case("BERT-base, 128 tokens", model, [((row,), {}) for row in tokens])


SIDE = 512
SQUARES = 4
STEPS = 400
PIXELS = 2048


def checkerboard() -> Case:
    """An MLP from a pixel's position, each coordinate from -1 to 1, to its colour, 0 or 1; trained for some seconds.

    Its one call holds every pixel that there is, 262144 of them: there is no second input to average over.
    """
    pixel = torch.arange(SIDE * SIDE)
    row, column = pixel // SIDE, pixel % SIDE
    positions = torch.stack([row, column], 1) / (SIDE - 1) * 2 - 1
    colours = ((row * SQUARES // SIDE + column * SQUARES // SIDE) % 2).float().unsqueeze(1)
    with torch.random.fork_rng(devices=()), torch.enable_grad():
        torch.manual_seed(SEED)
        hidden = [nn.Linear(2, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
        model = nn.Sequential(*hidden, nn.Linear(256, 1))
        optimizer = torch.optim.Adam(model.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
        for _ in range(STEPS):
            batch = torch.randint(0, SIDE * SIDE, (PIXELS,))
            loss = squared_error(model(positions[batch]), colours[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    title = f"MLP 2-256-256-256-1, checkerboard of {SQUARES}x{SQUARES} on {SIDE}x{SIDE} pixels"
    return Case(title, model.eval(), [((positions,), {})], colours)


def squared_error(values: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, which the checkerboard's net is trained on."""
    return nn.functional.mse_loss(values, target)


SEED_CASES: dict[str, Callable[[], Case]] = {
    "bit_m_r101x1": image_net("timm", "resnetv2_101x1_bit", 224),
    "tf_efficientnet_b4": image_net("timm", "tf_efficientnet_b4", 380),
    "resnet18": image_net("torchvision", "resnet18", 224),
    "bert_base": bert,
    "checkerboard": checkerboard,
}


def zoo_sample() -> dict[str, Callable[[], Case]]:
    """The models of the zoo that every run of the tests tries."""
    entries = {entry.title: entry for entry in read_list()}
    return {title: lambda entry=entries[title]: from_entry(entry, entry.title) for title in SAMPLE}  # type: ignore[misc]
