"""A random model as text, and how a module and its inputs are made from it, the same every time."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import linecache
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

HEADER = """import torch
from torch import nn
from torch.nn import functional as F
"""


@dataclass(frozen=True)
class RandomModel:
    """A model as text, and how it is made from it.

    `source` defines `Model` and `example_inputs()`; `dtype` is torch's default dtype while both are made; `phrases` are the
    names of those it was drawn from.

    >>> text = HEADER + '''
    ... class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm1 = nn.BatchNorm1d(3)
    ...     def forward(self, x1):
    ...         return self.norm1(x1)
    ... def example_inputs():
    ...     return (torch.randn(2, 3),)
    ... '''
    >>> model = RandomModel(text)
    >>> model.module()(*model.inputs()).dtype
    torch.float64
    """

    source: str
    seed: int = 0
    dtype: torch.dtype = torch.float64
    phrases: tuple[str, ...] = ()

    def module(self) -> nn.Module:
        """The model in eval mode, the same every time. TorchScript and `inspect` find its source."""
        return build(self._defined("Model"), self.seed, self.dtype)

    def inputs(self) -> tuple[Tensor, ...]:
        """The positional arguments of one call, the same every time."""
        return make_inputs(self._defined("example_inputs"), self.seed, self.dtype)

    def _defined(self, name: str) -> Any:
        """`Model` or `example_inputs`. The text stays registered for as long as that lives."""
        file = f"<random model {next(_numbers)}>"
        namespace: dict[str, Any] = {"__name__": "random_model"}
        exec(compile(self.source, file, "exec"), namespace)
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        weakref.finalize(namespace[name], linecache.cache.pop, file, None)
        return namespace[name]

    @property
    def name(self) -> str:
        """A name made of the text: the same text has the same name."""
        return hashlib.sha256(f"{self.source}{self.seed}{self.dtype}".encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        return f"RandomModel(seed={self.seed}, dtype={self.dtype}, phrases={self.phrases}, source='''\n{self.source}''')"


_numbers = itertools.count()


def build(model: Callable[[], nn.Module], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`model()` with random weights from `seed`, `dtype` as the default dtype, in eval mode.

    Batch norms get statistics and an affine map far from the identity: with mean 0, variance 1, scale 1 and shift 0 they do
    nothing, and a wrong fold would go unseen.

    >>> int(build(lambda: nn.BatchNorm1d(2)).running_mean.ne(0).sum())
    2
    """
    with made_from(seed, dtype), torch.no_grad():
        made = model()
        for module in made.modules():
            randomize_norm(module)
    return made.eval().requires_grad_(False)


def make_inputs(
    example_inputs: Callable[[], tuple[Tensor, ...]], seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    """`example_inputs()` with random values from `seed` and `dtype` as the default dtype.

    >>> make_inputs(lambda: (torch.randn(2),))[0].dtype
    torch.float64
    """
    with made_from(seed + 1, dtype):
        return example_inputs()


def randomize_norm(module: nn.Module) -> None:
    """Give a batch norm random statistics and a random affine map; leave any other module alone."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        if isinstance(module.running_mean, Tensor) and isinstance(module.running_var, Tensor):
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2.0)
        if module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)


@contextlib.contextmanager
def made_from(seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Random numbers from `seed` and `dtype` as the default dtype; both are put back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        with default_dtype(dtype):
            yield
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """`dtype` as the default dtype, put back afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
