"""Random models and random pipelines for property tests (hypothesis).

Models are drawn as a small language of layers, aimed at what the rules look for: convolutions followed by norms,
activations and sums, with what makes rules refuse in between (a second reader, a shared module, a missing bias, an
in-place op, a broadcast sum, dropout).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from passes.pipeline import ORDER_RULES

ACTIVATIONS = {
    "relu": torch.relu,
    "relu_": lambda x: F.relu(x, inplace=True),
    "relu6": F.relu6,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "hardswish": F.hardswish,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "elu": F.elu,
}


@dataclass(frozen=True)
class Layer:
    """One line of a model: what it is, its settings, and whether its input is kept for a later sum."""

    kind: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings)[name]


class RandomNet(nn.Module):
    """A convolutional net from a list of layers; channels stay `channels`, so that any order of layers is valid."""

    def __init__(self, layers: list[Layer], channels: int, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.layers = layers
        self.parts = nn.ModuleList(self._part(layer, channels) for layer in layers)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.normal_(module.bias)
        self.eval()

    @staticmethod
    def _part(layer: Layer, channels: int) -> nn.Module:
        if layer.kind == "conv":
            kernel, dilation = layer["kernel"], layer["dilation"]
            padding = "same" if layer["same"] else dilation * (kernel - 1) // 2
            groups = {"one": 1, "two": 2, "depthwise": channels}[layer["groups"]]
            return nn.Conv2d(channels, channels, kernel, 1, padding, dilation, groups, layer["bias"])
        if layer.kind == "transposed":
            return nn.ConvTranspose2d(channels, channels, 3, 1, 1, groups=layer["groups"], bias=layer["bias"])
        if layer.kind == "norm":
            return nn.BatchNorm2d(channels, affine=layer["affine"])
        if layer.kind == "dropout":
            return nn.Dropout2d(0.3) if layer["spatial"] else nn.Dropout(0.3)
        if layer.kind == "pool":
            return nn.MaxPool2d(3, 1, 1) if layer["max"] else nn.AvgPool2d(3, 1, 1)
        if layer.kind == "norm_last":
            return nn.LayerNorm(layer["size"])
        return nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x
        for layer, part in zip(self.layers, self.parts, strict=True):
            if layer.kind == "activation":
                x = ACTIVATIONS[layer["name"]](x.clone() if layer["name"] == "relu_" and x is kept else x)
            elif layer.kind == "keep":
                kept = x
                x = x * 1.0 if layer["read_twice"] else x
            elif layer.kind == "sum":
                x = kept + x if layer["left"] else x + kept
            elif layer.kind == "broadcast_sum":
                x = x + kept.mean((2, 3), keepdim=True)
            elif layer.kind == "again" and len(self.parts):
                # The first convolution once more: a module, and a weight, with two call sites.
                first = next((p for p in self.parts if isinstance(p, nn.Conv2d)), None)
                x = first(x) if first is not None else x
            else:
                x = part(x)
        return x


def _layer(kind: str, **settings: st.SearchStrategy) -> st.SearchStrategy[Layer]:
    return st.fixed_dictionaries(settings).map(lambda s: Layer(kind, tuple(s.items())))


CONV = _layer(
    "conv", kernel=st.sampled_from([1, 2, 3]), dilation=st.sampled_from([1, 2]), same=st.just(True),
    groups=st.sampled_from(["one", "two", "depthwise"]), bias=st.booleans(),
)  # fmt: skip
NORM = _layer("norm", affine=st.booleans())
ACTIVATION = _layer("activation", name=st.sampled_from(sorted(ACTIVATIONS)))
SUM = _layer("sum", left=st.booleans())

# Phrases, so that what rules look for is common.
PHRASES = st.one_of(
    st.tuples(CONV, NORM, ACTIVATION),
    st.tuples(CONV, NORM),
    st.tuples(CONV, NORM, NORM),
    st.tuples(CONV, _layer("dropout", spatial=st.booleans()), NORM, ACTIVATION),
    st.tuples(_layer("keep", read_twice=st.booleans()), CONV, NORM, SUM, ACTIVATION),
    st.tuples(CONV, _layer("broadcast_sum"), ACTIVATION),
    st.tuples(CONV, ACTIVATION, _layer("again"), NORM),
    st.tuples(_layer("transposed", groups=st.sampled_from([1, 2]), bias=st.booleans()), NORM, ACTIVATION),
    st.tuples(CONV, _layer("keep", read_twice=st.just(True)), NORM),
    st.tuples(_layer("pool", max=st.booleans())),
    st.tuples(NORM, ACTIVATION),
)


@st.composite
def conv_nets(draw: st.DrawFn) -> tuple[RandomNet, torch.Tensor]:
    """A random net and an input for it, float32."""
    phrases = draw(st.lists(PHRASES, min_size=2, max_size=4))
    channels = draw(st.sampled_from([2, 4]))
    seed = draw(st.integers(0, 2**16))
    net = RandomNet([layer for phrase in phrases for layer in phrase], channels, seed)
    shape = (draw(st.sampled_from([1, 2])), channels, draw(st.sampled_from([4, 5])), 6)
    x = torch.randn(shape)
    return net, x.to(memory_format=torch.channels_last) if draw(st.booleans()) else x


@st.composite
def pipelines(draw: st.DrawFn, names: list[str]) -> list[str]:
    """A random subset of `names` with at least one fusing pass in it, in a random order that breaks no order rule."""
    fusing = draw(st.sampled_from(["fuse_conv_bn", "fuse_conv_relu"]))
    left_out = draw(st.sets(st.sampled_from([name for name in names if name != fusing])))
    chosen = [name for name in draw(st.permutations(names)) if name not in left_out]
    allowed: nx.DiGraph = nx.DiGraph()
    allowed.add_nodes_from(chosen)
    allowed.add_edges_from((a, b) for a, b, _ in ORDER_RULES if a in chosen and b in chosen)
    return list(nx.lexicographical_topological_sort(allowed, key=chosen.index))
