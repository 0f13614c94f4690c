"""The models of the zoo: reads `zoo.txt`, whose head explains its format, and builds what it names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ir_tools.torchvision_ops import import_torchvision
from passes.cli.example_inputs import SEED, example_input
from passes.cli.sources import randomize_batch_norms

LIST = Path(__file__).with_name("zoo.txt")
SAMPLE = (
    "torchvision:mobilenet_v3_small",
    "torchvision:squeezenet1_1",
    "timm:lcnet_050",
    "timm:repvgg_a0",
    "timm:vit_tiny_patch16_224",
    "transformers:BertModel",
    "transformers:LlamaForCausalLM",
    "transformers:T5ForConditionalGeneration",
    "transformers:ViTModel",
)
"""Titles of the entries that every run of the tests tries."""

_INPUT = re.compile(r"scalar|\d+(x\d+)*(:\w+)*")
_MASK = ":mask"


@dataclass(frozen=True)
class Entry:
    """One model of the list: what builds it, and the inputs that it is called with."""

    source: str
    name: str
    options: dict[str, Any]
    inputs: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.source}:{self.name}"

    def build(self) -> nn.Module:
        """The model in eval mode, with random weights and batch-norm statistics, the same ones on every run."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(SEED)
            model = BUILDERS[self.source](self.name, self.options).eval()
            randomize_batch_norms(model)
            randomize_zeros(model)
        return model

    def arguments(self, seed: int = SEED) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of one call, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for text in self.inputs:
            name, _, value = text.rpartition("=")
            argument = _argument(value, generator)
            if name:
                kwargs[name] = argument
            else:
                args.append(argument)
        return tuple(args), kwargs


def read_list(path: Path = LIST) -> list[Entry]:
    """The entries of a list, in its order. Raises ValueError for a line that is none, or a name that comes twice."""
    entries = [_entry(line) for line in _logical_lines(path.read_text())]
    titles = [entry.title for entry in entries]
    twice = sorted({title for title in titles if titles.count(title) > 1})
    if twice:
        raise ValueError(f"{path} names {', '.join(twice)} more than once")
    return entries


def _logical_lines(text: str) -> Iterator[str]:
    """Lines without comments, each with the indented ones that continue it."""
    whole = ""
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace() and whole:
            yield whole
            whole = ""
        whole += " " + line.strip()
    if whole:
        yield whole


def _entry(line: str) -> Entry:
    head, bar, inputs = line.partition("|")
    title, *options = head.split()
    source, _, name = title.partition(":")
    if not bar or source not in BUILDERS or not name or not inputs.split():
        raise ValueError(f"{line.strip()!r} is no entry; expected SOURCE:NAME option=value ... | input ...")
    pairs = (option.partition("=") for option in options)
    return Entry(source, name, {key: json.loads(value) for key, _, value in pairs}, tuple(inputs.split()))


def _argument(text: str, generator: torch.Generator) -> Any:
    """A tensor, or a number such as a count that the model takes."""
    if text.endswith(_MASK):
        return padding_mask([int(size) for size in text.removesuffix(_MASK).split("x")])
    return example_input(text, generator) if "x" in text or ":" in text else json.loads(text)


def padding_mask(shape: list[int]) -> torch.Tensor:
    """Ones, int64; the last quarter of the last row is zeros, as when a shorter sequence was padded."""
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, shape[-1] - shape[-1] // 4 :] = 0
    return mask


def randomize_zeros(model: nn.Module) -> None:
    """Give parameters that start as zeros small random values, in place: behind a head of zeros every number is right."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0, 0.02)


# -- builders -------------------------------------------------------------------------------------------------------------


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    models = import_torchvision().models
    if name.startswith(("deeplabv3", "fcn", "lraspp")):
        options = {"weights_backbone": None, **options}  # it would be downloaded
    return models.get_model(name, weights=None, **options)


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()  # timm and transformers import it, and its operators may have to be declared first
    import timm

    return timm.create_model(name, pretrained=False, **options)


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    import_torchvision()
    import transformers

    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**options))


BUILDERS: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "torchvision": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}
