"""Random models, aimed at what rewrite rules look for and at what makes them refuse (hypothesis).

A model is drawn as text, a class that can be read and pasted into a test:

    class Model(nn.Module):                                  self.conv1 = nn.Conv2d(4, 2, 3, padding=1)
        def __init__(self): ...                              self.norm2 = nn.BatchNorm2d(2)
        def forward(self, x1):                               v2 = self.conv1(x1)
            ...                                              v3 = self.norm2(v2)

It is a few *phrases* (`passes.testing.phrases`), each of which holds the left side of a rule or nearly, in random order. A
phrase reads what an earlier one gave, where the rank fits, or a new input; what nobody reads is returned. Every statement
is run as soon as it is drawn, so that shapes and dtypes are known and every model is valid.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import linecache
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from ir_tools.torch_compat.modules import BatchNorm

HEADER = """import torch
from torch import nn
from torch.nn import functional as F
"""

OFTEN = (
    "conv_norm", "layer_activation", "linear_norm", "norm_conv", "norm_linear", "pointwise_conv", "conv_pointwise",
    "linear_residual", "moved_linear_norm", "moved_linear_norm", "turned_after", "turned_before", "turned_before",
    "neutral", "neutral", "neutral_discrete", "fragile", "fragile", "fragile", "attention", "attention",
)  # fmt: skip
"""Phrases drawn twice as often as others, or more often: what most models are made of, and those that serve many rules."""

LARGEST = 1e4
"""Values beyond this are not drawn on: after a few more phrases only rounding errors would be left of them."""


# -- a drawn model ------------------------------------------------------------------------------------------------------


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
    if isinstance(module, BatchNorm):
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


# -- drawing ------------------------------------------------------------------------------------------------------------


class NotHere(Exception):
    """A phrase cannot go on with what it drew; what it wrote so far is taken back."""


@dataclass
class Draft:
    """The text of a model while it is drawn, with an example of every value."""

    constructor: list[str] = field(default_factory=list)
    forward: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)  # name: the expression that makes it
    values: dict[str, Any] = field(default_factory=dict)
    results: list[str] = field(default_factory=list)  # of phrases: what later ones may read
    count: int = 0

    def copy(self) -> Draft:
        lists = list(self.constructor), list(self.forward), dict(self.inputs), dict(self.values), list(self.results)
        return Draft(*lists, self.count)


class Writer:
    """What phrases write with: choices, statements and modules. Every statement is run on example values.

    `draw` is hypothesis'; `dtype` the default dtype of the model, that of every input.
    """

    def __init__(self, draw: st.DrawFn, dtype: torch.dtype):
        self._draw = draw  # that of the phrase being written
        self.dtype = dtype
        self.draft = Draft()
        self.module = nn.Module()
        self._globals: dict[str, Any] = {"self": self.module}
        exec(HEADER, self._globals)

    # Choices.

    def pick(self, *options: Any) -> Any:
        """One of `options`; hypothesis shrinks towards the first."""
        return self._draw(_sampled(options))

    def flip(self) -> bool:
        return bool(self._draw(_sampled((False, True))))

    def rarely(self) -> bool:
        """True one time in six."""
        return bool(self._draw(_sampled((False,) * 5 + (True,))))

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
        """What the phrase computed: later phrases may read it, and what none reads is returned by the model."""
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

    # Values to read.

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


def _sampled(options: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    """One strategy per tuple of options: making one costs more than drawing from it. `1` and `True` are told apart."""
    return _sampled_hashable(options, tuple(map(type, options)))


def call_of_randn(shape: Sequence[int]) -> str:
    return f"torch.randn({', '.join(map(str, shape))})"


def _permuted(shape: tuple[int, ...]) -> str:
    """An input of this shape with its last axis outermost in memory."""
    order = ", ".join(map(str, (*range(1, len(shape)), 0)))
    return call_of_randn((shape[-1], *shape[:-1])) + f".permute({order})"


Phrase = Callable[[Writer], None]


def random_models(
    phrases: Sequence[str] = (), *, dtypes: Sequence[torch.dtype] = (torch.float64,), most: int = 5
) -> st.SearchStrategy[RandomModel]:
    """Random valid models of up to `most` phrases each.

    Args:
        phrases: names from `passes.testing.phrases.PHRASES`; all of them when none is given.
        dtypes: the default dtypes to draw from, that of inputs and weights. A phrase may compute in a narrower one.
        most: the largest number of phrases.

    The outputs of every model are finite on its inputs. Raises `ValueError` for a name that is no phrase.

    >>> from hypothesis import given, settings
    >>> @settings(max_examples=2, database=None)
    ... @given(random_models(["linear_norm"]))
    ... def runs(model):
    ...     assert "nn.Linear" in model.source
    ...     model.module()(*model.inputs())
    >>> runs()
    """
    from passes.testing.phrases import PHRASES

    unknown = [name for name in phrases if name not in PHRASES]
    if unknown:
        raise ValueError(f"there is no phrase {unknown[0]!r}; there are: {', '.join(PHRASES)}")
    return _drawn(tuple(phrases or (*PHRASES, *OFTEN)), tuple(dtypes), most)


@st.composite
def _slot(draw: st.DrawFn, writer: Writer, phrases: tuple[str, ...], may_be_empty: bool) -> str:
    """Write one phrase, or none; its name. A strategy of its own, so that hypothesis can shrink it to none by itself."""
    from passes.testing.phrases import PHRASES

    if may_be_empty and not draw(_sampled((False, True, True))):
        return ""
    name = draw(_sampled(phrases))
    before, writer._draw = writer.draft.copy(), draw
    try:
        PHRASES[name](writer)
    except (NotHere, RuntimeError, ValueError, IndexError):  # such as a kernel larger than its image
        writer.draft = before
        return ""
    return name


@st.composite
def _drawn(draw: st.DrawFn, phrases: tuple[str, ...], dtypes: tuple[torch.dtype, ...], most: int) -> RandomModel:
    seed, dtype = draw(_sampled(tuple(range(32)))), draw(_sampled(dtypes))
    writer = Writer(draw, dtype)
    with made_from(seed, torch.get_default_dtype()), torch.no_grad():  # as when the model runs
        slots = [draw(_slot(writer, phrases, most > 1)) for _ in range(most)]
    said = [name for name in slots if name]
    assume(said)
    writer._draw = draw
    model = RandomModel(_text(writer), seed, dtype, tuple(said))
    with torch.no_grad():
        given = nn.Module.__call__(model.module(), *model.inputs())
    outputs = given if isinstance(given, tuple) else (given,)
    assume(all(bool(t.isfinite().all()) for t in outputs if t.is_floating_point()))
    return model


def _text(writer: Writer) -> str:
    """The model as text: every statement drawn, and an ending that reads what no statement does."""
    draft = writer.draft
    read = set(re.findall(r"\b[vx]\d+\b", " ; ".join(line.partition(" = ")[2] or line for line in draft.forward)))
    left = [name for name in dict.fromkeys(draft.results) if name not in read]
    left = left or draft.results[-1:]
    first = draft.values[left[0]]
    alike = all(draft.values[n].shape == first.shape and draft.values[n].dtype == first.dtype for n in left)
    if len(left) > 1 and alike and first.dim():
        ending = writer.pick(", ".join(left), " + ".join(left), f"torch.cat([{', '.join(left)}])")
    else:
        ending = ", ".join(left)
    used = set(re.findall(r"\bx\d+\b", " ".join([*draft.forward, ending])))
    inputs = {name: made for name, made in draft.inputs.items() if name in used}
    body = "\n".join(f"        {line}" for line in draft.constructor)
    lines = "\n".join(f"        {line}" for line in [*draft.forward, f"return {ending}"])
    return (
        f"{HEADER}\n\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n{body}\n\n"
        f"    def forward({', '.join(['self', *inputs])}):\n{lines}\n\n\n"
        f"def example_inputs():\n    return ({', '.join(inputs.values())},)\n"
    ).replace("\n\n\n    def forward", "\n\n    def forward")
