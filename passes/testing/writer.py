"""What phrases write a model with: what hypothesis draws, statements, modules, and values to use.

Every statement is run as soon as it is drawn, so that shapes and dtypes are known and every model is valid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from passes.testing.model_text import HEADER, default_dtype, randomize_norm

LARGEST = 1e4
"""Larger values are not used further: after a few more phrases only rounding errors would be left of them."""


class NotHere(Exception):
    """A phrase cannot go on with what it drew; what it wrote so far is taken back."""


@dataclass
class Draft:
    """The text of a model while it is drawn, with an example of every value."""

    constructor: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)  # name: the expression that makes it
    values: dict[str, Any] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)  # of phrases: what later ones may use
    count: int = 0

    def copy(self) -> Draft:
        lists = list(self.constructor), list(self.forward), dict(self.inputs), dict(self.values), list(self.results)
        return Draft(*lists, self.count)


class Writer:
    """What phrases write with: what is drawn, statements and modules. Every statement is run on example values.

    `draw` is hypothesis'; `dtype` the default dtype of the model, that of every input.
    """

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype):
        self.draw = draw  # that of the phrase being written
        self.dtype = dtype
        self.draft = Draft()
        self.module = nn.Module()
        self._globals: dict[str, Any] = {"self": self.module}
        exec(HEADER, self._globals)

    # What is drawn.

    def pick(self, *options: Any) -> Any:
        """One of `options`; hypothesis shrinks towards the first."""
        return self.draw(sampled(options))

    def flip(self) -> bool:
        return bool(self.draw(sampled((False, True))))

    def rarely(self) -> bool:
        """True one time in six."""
        return bool(self.draw(sampled((False,) * 5 + (True,))))

    def number(self) -> float:
        return float(self.pick(2.0, 0.5, -1.5, 3.0))

    def need(self, condition: Any) -> None:
        """Give the phrase up unless `condition`."""
        if not condition:
            raise NotHere

    # Text.

    def let(self, expression: str) -> str:
        """A new value: `v3 = <expression>`."""
        self.draft.count += 1
        name = f"v{self.draft.count}"
        self.do(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        """A statement of `forward`."""
        exec(statement, self._globals, self.draft.values)
        self.draft.forward.append(statement)

    def make(self, stem: str, expression: str) -> str:
        """A new module or attribute, `self.conv1 = <expression>`; returns `self.conv1`."""
        self.draft.count += 1
        name = f"{stem}{self.draft.count}"
        self.construct(f"self.{name} = {expression}")
        part = getattr(self.module, name)
        if isinstance(part, nn.Module):
            part.eval()
            for module in part.modules():
                randomize_norm(module)
        return f"self.{name}"

    def buffer(self, expression: str) -> str:
        """A new buffer; returns `self.buffer1`."""
        self.draft.count += 1
        self.construct(f'self.register_buffer("buffer{self.draft.count}", {expression})')
        return f"self.buffer{self.draft.count}"

    def construct(self, statement: str) -> None:
        """A statement of the constructor."""
        with default_dtype(self.dtype):
            exec(statement, self._globals, {"self": self.module})
        self.draft.constructor.append(statement)

    def give(self, *names: str) -> None:
        """What the phrase computed: later phrases may use it, and what none uses is returned by the model."""
        for name in names:
            value = self.draft.values[name]
            finite = not value.is_floating_point() or bool((value.double().abs() <= LARGEST).all())
            self.need(finite)
            self.draft.results.append(name)

    # Facts.

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.draft.values[name].shape)

    def rank(self, name: str) -> int:
        return len(self.shape(name))

    # Values to use.

    def new_input(self, *shape: int, plain: bool = False) -> str:
        """A new input of the model, of one of several memory layouts unless `plain`."""
        self.draft.count += 1
        name = f"x{self.draft.count}"
        self.draft.inputs[name] = call_of_randn(shape) if plain else self._input(shape)
        with default_dtype(self.dtype):
            self.draft.values[name] = eval(self.draft.inputs[name], self._globals).clone()
        return name

    def _input(self, shape: tuple[int, ...]) -> str:
        plain = call_of_randn(shape)
        layout = self.pick("plain", "plain", "plain", "channels_last", "permuted", "strided", "expanded")
        if layout == "channels_last" and len(shape) == 4:
            return f"{plain}.to(memory_format=torch.channels_last)"
        if layout == "permuted" and len(shape) > 1:
            return _permuted(shape)
        if layout == "strided":
            return call_of_randn((*shape[:-1], 2 * shape[-1])) + "[..., ::2]"
        if layout == "expanded" and len(shape) > 1:
            return call_of_randn((1, *shape[1:])) + f".expand({', '.join(map(str, shape))})"
        return plain

    def value(self, *ranks: int, at_least: int = 1, empty: bool = True) -> str:
        """A value of one of these ranks, of the model's dtype: what a phrase gave, or a new input.

        Its axes but the first have `at_least` elements and at most 12; the first 0, 1 or 2 in a new input, if `empty`.
        """
        if self.draft.results and self.pick(True, True, True, False):
            fitting = [name for name in self.draft.results if self._fits(name, ranks, at_least, empty)]
            if fitting:
                return str(self.pick(*reversed(fitting)))
        rank = self.pick(*ranks)
        batch = [] if rank == 1 else [self.pick(2, 2, 2, 2, 1, 1, 1, 0 if empty else 2)]
        channels = [self.pick(4, 2, 3)] if rank != 2 else []
        return self.new_input(*batch, *channels, *(max(at_least, self.pick(4, 5, 6)) for _ in range(rank - 2 + (rank == 2))))

    def _fits(self, name: str, ranks: Sequence[int], at_least: int, empty: bool) -> bool:
        value = self.draft.values[name]
        sizes = value.shape[1:] if value.dim() > 1 else value.shape
        fitting = value.dim() in ranks and all(min(at_least, 2) <= size <= 12 for size in sizes)
        spatial = all(size >= at_least for size in value.shape[2:])
        return fitting and (empty or value.numel() > 0) and spatial and value.dtype == self.dtype and value.numel() <= 4096


@lru_cache(maxsize=4096)
def _sampled_hashable(options: tuple[Any, ...], kinds: tuple[type, ...]) -> st.SearchStrategy[Any]:
    return st.sampled_from(options)


def sampled(options: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """One strategy per tuple of options: making one costs more than drawing from it. `1` and `True` are kept apart."""
    return _sampled_hashable(options, tuple(map(type, options)))


def call_of_randn(shape: Sequence[int]) -> str:
    return f"torch.randn({', '.join(map(str, shape))})"


def _permuted(shape: tuple[int, ...]) -> str:
    """An input of this shape with its last axis outermost in memory."""
    order = ", ".join(map(str, (*range(1, len(shape)), 0)))
    return call_of_randn((shape[-1], *shape[:-1])) + f".permute({order})"


Phrase = Callable[[Writer], None]
