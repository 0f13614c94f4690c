"""Are the facts of a Program true? It is run, and each value compared with what its node says: shape, dtype, device, strides.

A fact may say less than is true, never something else. Sizes that are symbols stand for any; strides that are expressions of
symbols are computed from the sizes that the symbols had in this run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, strided

from ir_tools.ir import Program, facts
from ir_tools.ir.facts import Fact, ListFact, ScalarFact, TensorFact, TupleFact
from ir_tools.ir.prepack import is_prepack
from ir_tools.torch_compat.tensors import likely_memory_format


def untrue_facts(program: Program, *inputs: Tensor) -> list[str]:
    """A line for each value that is not what its node says; `inputs` are flat tensors, which are copied.

    >>> from ir_tools.frontends.capture import capture
    >>> from ir_tools.frontends.source import prepare
    >>> import torch
    >>> x = torch.randn(2, 3)
    >>> untrue_facts(capture(prepare(torch.nn.ReLU(), [((x,), {})]), "trace").program, x)
    []
    """
    sizes: dict[Any, int] = {}
    wrong: dict[str, str] = {}

    def see(node: fx.Node, known: Fact, value: Any) -> None:
        if not _is_true(known, value, sizes):
            wrong[node.name] = f"{node.name}: the fact says {sketch(known)}, running gives {sketch(value)}"

    _watched(program, inputs, see)
    return list(wrong.values())


@dataclass(frozen=True)
class KnownStrides:
    """How many tensors of a run on the CPU there are, and of how many the strides were known; what lacks them, by op."""

    tensors: int
    known: int
    lacking: Counter[str]

    @property
    def share(self) -> float:
        return self.known / self.tensors if self.tensors else 1.0


def known_strides(program: Program, *inputs: Tensor) -> KnownStrides:
    """Counted over the tensors that the ops of the Program gave when it ran on `inputs`."""
    known: dict[str, bool] = {}
    ops: dict[str, str] = {}

    def see(node: fx.Node, fact: Fact, value: Any) -> None:
        if node.op == "call_function" and isinstance(value, Tensor) and value.device.type == "cpu":
            known[node.name] = isinstance(fact, TensorFact) and fact.strides is not None
            ops[node.name] = str(node.target)

    _watched(program, inputs, see)
    return KnownStrides(len(known), sum(known.values()), Counter(ops[name] for name, has in known.items() if not has))


def _watched(program: Program, inputs: tuple[Tensor, ...], see: Callable[[fx.Node, Fact, Any], None]) -> None:
    """Run the Program; `see` gets each value with its node and fact, those in the bodies of regions too."""

    def watch(node: fx.Node, value: Any) -> None:
        opaque = is_prepack(node) and value.layout is not strided  # even to shape questions in some builds
        if node.op != "output" and not opaque:
            see(node, facts.fact(node), value)

    program.run(*(t.clone() for t in inputs), watch=watch)


def _is_true(known: Fact, value: Any, sizes: dict[Any, int]) -> bool:
    if isinstance(known, TensorFact):
        return isinstance(value, Tensor) and _describes(known, value, sizes)
    if isinstance(known, TupleFact):
        several = isinstance(value, (list, tuple)) and len(known) == len(value)
        return several and all(_is_true(k, v, sizes) for k, v in zip(known.parts, value))
    if isinstance(known, ListFact):
        parts = list(value.values()) if isinstance(value, dict) else value
        return isinstance(parts, list) and all(_is_true(known.elements, v, {}) for v in parts if isinstance(v, Tensor))
    if isinstance(known, ScalarFact):
        kind = type(value) is known.kind or (isinstance(value, Tensor) is False and known.is_known and known.value is None)
        return kind and (not known.is_known or bool(known.value == value))
    return True


def _describes(known: TensorFact, value: Tensor, sizes: dict[Any, int]) -> bool:
    kind = (value.dtype, value.device.type, value.dim(), value.layout)
    if (known.dtype, known.device.type, known.rank, known.layout) != kind:
        return False
    for size, given in zip(known.shape, value.shape, strict=True):
        if not isinstance(size, int) and size.is_Symbol:
            sizes[size] = given  # a symbol of a loop is another size in each round
    for size, given in zip(known.shape, value.shape, strict=True):
        expected = size if isinstance(size, int) else size.xreplace(sizes)
        if getattr(expected, "is_number", True) and int(expected) != given:
            return False
    if known.strides is None or value.layout is not strided or value.numel() == 0:
        return True
    for size, stride, given in zip(value.shape, known.strides, value.stride(), strict=True):
        expected = stride if isinstance(stride, int) else stride.xreplace(sizes)
        if size != 1 and getattr(expected, "is_number", True) and int(expected) != given:
            return False
    # Kernels are chosen by the strides of axes of one element too.
    return known.has_symbols or likely_memory_format(facts.as_meta(known)) == likely_memory_format(value)


def sketch(value: Any) -> str:
    """Dtypes, shapes and strides of the tensors in a value or a fact.

    >>> import torch
    >>> sketch([torch.zeros(2, 3), 1])
    '[float32[2, 3] at [3, 1], 1]'
    """
    if isinstance(value, Tensor):
        return sketch(TensorFact.of(value))
    if isinstance(value, TensorFact):
        lies = "" if value.strides is None else f" at {list(value.strides)}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{lies}"
    if isinstance(value, TupleFact):
        return sketch(list(value.parts))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(sketch, value)) + "]"
    return repr(value.value) if isinstance(value, ScalarFact) else repr(value)
