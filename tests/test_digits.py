"""Half precision on nets that learned something: digits of scikit-learn, and how many of them are classified correctly.

With random weights every class is as good as another; a trained net has classes that it is sure of and a few images that it
is not. Half of the 1797 images train, the other 899 test: 0.2 points are 1.8 of them, so one more wrong answer than the
float32 net gives is allowed, and no second one. "The same class" is asked of 99 %, that is of all but 8 images.

Both dtypes are compared with `torch.autocast("cpu", dtype)` of the same dtype, which torch 2.13 has for float16 too.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from passes import DEFAULT, load, optimize

EPOCHS = 25
SAME_CLASS = 0.99
LOST_POINTS = 0.2


class RowAttention(nn.Module):
    """One layer of attention over the 8 rows of a digit, with layer norms in front of attention and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(torch.randn(8, 64) * 0.1)
        self.before_attention, self.before_mlp = nn.LayerNorm(64), nn.LayerNorm(64)
        self.query_key_value, self.out = nn.Linear(64, 192), nn.Linear(64, 64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1)) + self.position
        parts = self.query_key_value(self.before_attention(x)).chunk(3, -1)
        query, key, value = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in parts)
        weights = torch.softmax(query @ key.transpose(-2, -1) / 4, -1)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.before_mlp(x))))
        return self.head(x.flatten(1))


def conv_bn_relu() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    pool = nn.MaxPool2d(2)
    return nn.Sequential(*block(1, 32), *block(32, 32), pool, *block(32, 64), pool, nn.Flatten(), nn.Linear(256, 10))


def mlp_with_layer_norm() -> nn.Module:
    def block(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 256), nn.LayerNorm(256), nn.GELU()]

    return nn.Sequential(nn.Flatten(), *block(64), *block(256), nn.Linear(256, 10))


NETS = {"conv_bn_relu": conv_bn_relu, "mlp_with_layer_norm": mlp_with_layer_norm, "row_attention": RowAttention}


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and classes, test images and classes; images are [n, 1, 8, 8] from 0 to 1."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    classes = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(order) // 2], order[len(order) // 2 :]
    return images[train], classes[train], images[test], classes[test]


@functools.cache
def trained(name: str) -> nn.Module:
    """The net, trained for a second or two; on one machine it is the same in every run."""
    images, classes, _, _ = digits()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        net = NETS[name]()
        steps = EPOCHS * len(torch.arange(len(images)).split(100))
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(images)).split(100):
                loss = F.cross_entropy(net(images[batch]), classes[batch], label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return net.eval()


@functools.cache
def eager_classes(name: str, dtype: torch.dtype) -> Tensor:
    """What the net says of each test image in float32, or under autocast to a half dtype."""
    _, _, images, _ = digits()
    net = trained(name)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        return net(images).argmax(1)


@pytest.mark.parametrize("name", NETS)
def test_the_net_learned_to_read(name: str) -> None:
    _, _, _, classes = digits()
    right = (eager_classes(name, torch.float32) == classes).double().mean().item()
    assert right >= 0.97, f"{name} classifies {right:.2%} of the digits correctly: too few for the other tests to mean much"


@pytest.mark.parametrize("level", ["O1", "O2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", NETS)
def test_the_digits_are_classified_as_well_in_half_precision(name: str, dtype: str, level: str, tmp_path: Path) -> None:
    _, _, images, classes = digits()
    fast = optimize(trained(name), [*DEFAULT, f"cast_half:dtype={dtype}:level={level}"], example_inputs=images)
    assert any(step.name == "cast_half" and step.rewrites for step in fast.report.steps)
    fast.save(tmp_path / "net.pt")
    wanted, autocast = (eager_classes(name, of) for of in (torch.float32, getattr(torch, dtype)))
    for kind, module in (("emitted", fast), ("saved and loaded", load(tmp_path / "net.pt"))):
        with torch.no_grad():
            scores = module(images)
        assert scores.dtype is torch.float32 and scores.isfinite().all()
        found = scores.argmax(1)
        same = (found == autocast).double().mean().item()
        lost = 100 * ((wanted == classes).double().mean() - (found == classes).double().mean()).item()
        figures = f"{name}, {dtype} {level}, {kind}: {same:.2%} as autocast says, {lost:.2f} points lost against float32"
        assert same >= SAME_CLASS, figures
        assert lost <= LOST_POINTS, figures
