"""How large the values of a Program get on given calls: a histogram of binary exponents per value.

A half dtype keeps what lies in its range and loses the rest: float16 turns 70000 into Inf and 1e-8 into 0. Which values of a
model leave that range cannot be seen in its graph; it takes data. A `Range` per value, counted while the Program runs, is
enough to ask of any dtype what it would lose, and needs a few hundred bytes, where the values themselves would need as much
memory as all activations of the model.

Exponents are those of `torch.frexp`: |x| with exponent e lies in [2^(e-1), 2^e). They are read off the bits of IEEE 754
numbers, which is twenty times faster than `frexp`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ir_tools.ir import Program


@dataclass(frozen=True)
class Range:
    """The magnitudes that one value took.

    - `exponents`: how many finite nonzero elements have which binary exponent, as in `torch.frexp`.
    - `largest`: the largest finite magnitude, 0.0 if there is none. `smallest`: the smallest nonzero one, inf if there is none.
    - `zeros`: how many elements are zero. `nonfinite`: whether any is NaN or Inf.
    """

    exponents: Mapping[int, int] = field(default_factory=dict)
    largest: float = 0.0
    smallest: float = math.inf
    zeros: int = 0
    nonfinite: bool = False

    def __add__(self, other: Range) -> Range:
        """The range of both together."""
        return Range(
            dict(sorted((Counter(self.exponents) + Counter(other.exponents)).items())),
            max(self.largest, other.largest),
            min(self.smallest, other.smallest),
            self.zeros + other.zeros,
            self.nonfinite or other.nonfinite,
        )

    def shifted(self, exponent_shift: int) -> Range:
        """The range of the values times `2 ** exponent_shift`."""
        exponents = {exponent + exponent_shift: count for exponent, count in self.exponents.items()}
        scale = 2.0**exponent_shift
        return Range(exponents, self.largest * scale, self.smallest * scale, self.zeros, self.nonfinite)


class Ranges(Mapping[str, Range]):
    """The ranges of a Program's values by the name of the node; `Ranges()` where nothing was observed.

    >>> seen = Ranges({"x": range_of(torch.tensor([0.5, 3.0]))})
    >>> seen["x"].largest, seen.get("y"), len(Ranges())
    (3.0, None, 0)
    """

    def __init__(self, by_node: Mapping[str, Range] | None = None):
        self._by_node = dict(by_node or {})

    def __getitem__(self, name: str) -> Range:
        return self._by_node[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_node)

    def __len__(self) -> int:
        return len(self._by_node)


@dataclass(frozen=True)
class _Format:
    """Where an IEEE 754 format has its exponent: dtype of the bits, number of fraction bits, and the bias."""

    bits: torch.dtype
    fraction: int
    bias: int
    width: int

    @property
    def infinity(self) -> int:
        """The bits of Inf; NaN has greater ones."""
        return ((1 << self.width) - 1) << self.fraction

    @property
    def least_normal(self) -> int:
        return 1 << self.fraction


FORMATS = {torch.float32: _Format(torch.int32, 23, 127, 8), torch.float64: _Format(torch.int64, 52, 1023, 11)}
"""Half dtypes are counted as float32, which holds each of their numbers."""

FLOATS = frozenset({torch.float16, torch.bfloat16, *FORMATS})


def range_of(values: torch.Tensor) -> Range:
    """The range of one floating-point tensor of any shape."""
    values = values.detach().reshape(-1)
    if values.dtype not in FORMATS:
        values = values.float()
    if values.numel() == 0:
        return Range()
    encoding = FORMATS[values.dtype]
    sign = torch.iinfo(encoding.bits).max  # all bits but the sign
    magnitudes = values.view(encoding.bits) & sign  # magnitudes of floats are in the order of their bits
    largest = int(magnitudes.max())
    if nonfinite := largest >= encoding.infinity:
        magnitudes = magnitudes[magnitudes < encoding.infinity]
        largest = int(magnitudes.max()) if magnitudes.numel() else 0
    if largest == 0:
        return Range(zeros=magnitudes.numel(), nonfinite=nonfinite)
    smallest = int(((magnitudes - 1) & sign).min()) + 1  # zero less one is the greatest of all
    counts = torch.bincount(magnitudes >> encoding.fraction, minlength=1 << encoding.width).tolist()
    zeros, subnormal = counts[0], Counter[int]()
    if smallest < encoding.least_normal:
        rest = magnitudes[(magnitudes > 0) & (magnitudes < encoding.least_normal)]
        zeros -= rest.numel()
        subnormal.update(torch.frexp(rest.view(values.dtype)).exponent.tolist())
    exponents = subnormal + Counter({e - encoding.bias + 1: n for e, n in enumerate(counts) if e})
    return Range(dict(sorted(exponents.items())), _number(largest, encoding), _number(smallest, encoding), zeros, nonfinite)


def _number(bits: int, encoding: _Format) -> float:
    """The number that `bits` stand for."""
    fraction, exponent = bits & (encoding.least_normal - 1), bits >> encoding.fraction
    if exponent:
        return math.ldexp(encoding.least_normal + fraction, exponent - encoding.bias - encoding.fraction)
    return math.ldexp(fraction, 1 - encoding.bias - encoding.fraction)


class Observation:
    """The ranges of a Program's values, call after call: of inputs, constants and results, by the name of the node.

    Only floating-point tensors have one. Values in branches and loops have one over all calls and rounds; what is in a branch
    that was never taken, or in a loop that made no round, has none.
    """

    def __init__(self, program: Program):
        self.program = program
        self._ranges: dict[str, Range] = {}
        self._waiting: dict[str, list[torch.Tensor]] = {}

    def call(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Run the Program on copies of `tensors`, count, and give the outputs. Constants count on the first call alone."""
        return self.program.run(*(t.clone() for t in tensors), watch=self._watch)

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges so far."""
        for name in list(self._waiting):
            self._count_waiting(name)
        return self._ranges

    def _watch(self, node: fx.Node, value: Any) -> None:
        if not is_counted(value):
            return
        if node.name not in self._ranges:
            self._ranges[node.name] = range_of(value)
        elif node.op != "get_attr" or node.target in self.program.state:  # a body may read what an earlier round wrote
            waiting = self._waiting.setdefault(node.name, [])
            waiting.append(value.detach().reshape(-1).clone())
            if sum(part.numel() for part in waiting) >= COUNTED_TOGETHER or len(waiting) >= MOST_WAITING:
                self._count_waiting(node.name)

    def _count_waiting(self, name: str) -> None:
        self._ranges[name] += range_of(torch.cat(self._waiting.pop(name)))


COUNTED_TOGETHER, MOST_WAITING = 1 << 13, 64
"""Elements, and tensors, up to which values of later rounds and calls wait to be counted as one: counting has a fixed cost."""


def is_counted(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in FLOATS and value.layout is torch.strided
