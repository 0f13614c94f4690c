"""What Python reads out of tensors when the model runs eagerly: each read with its line and, as text, what was read."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ir_tools.frontends.python_frames import Frame, frames, location_of, users_frame
from ir_tools.frontends.source import Source
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.frontends.user_model import call_model
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Read:
    """One time that Python learned values of a tensor: by which op, at which lines, and (as text) what it learned.

    `innermost` is the line that torch would warn about, `user` the innermost line that is not torch's own.
    """

    how: str
    innermost: Frame
    user: Frame
    value: str = ""

    @classmethod
    def here(cls, how: str, value: Any = None) -> Read:
        stack = list(frames())
        return cls(how, stack[0], users_frame(stack), _as_text(value))

    def __str__(self) -> str:
        return f"{self.how} at {location_of(self.user)}"


def _as_text(value: Any) -> str:
    """Equal for equal values (NaN included), and small."""
    text = repr(value)
    return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()


SCALAR_READS = {aten._local_scalar_dense.default: "item", aten.equal.default: "equal"}
"""Dispatched ops that give Python a value. `item` also stands for bool(), int(), float() and for reads inside C++."""

MEMORY_READS = {
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.__dlpack__: "dlpack",
}
"""Methods that read memory, past dispatch."""


class _ScalarReads(TorchDispatchMode):
    def __init__(self, reads: list[Read]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SCALAR_READS:
            self.reads.append(Read.here(SCALAR_READS[func], result))
        return result


class _MemoryReads(TorchFunctionMode):
    def __init__(self, reads: list[Read]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in MEMORY_READS:
            # As a list, because `repr` of a large tensor leaves most values out.
            self.reads.append(Read.here(MEMORY_READS[func], args[0].tolist()))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_reads() -> Iterator[list[Read]]:
    """The list that fills with what Python reads out of tensors inside the block."""
    reads: list[Read] = []
    with _ScalarReads(reads), _MemoryReads(reads):
        yield reads


@contextmanager
def lines_run(wanted: Collection[Frame]) -> Iterator[set[Frame]]:
    """The set that fills with those lines of `wanted` that Python executes inside the block."""
    ran: set[Frame] = set()
    files = {file for file, _ in wanted}

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        at = (frame.f_code.co_filename, frame.f_lineno)
        if at in wanted:
            ran.add(at)
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    if files:
        sys.settrace(on_call)
    try:
        yield ran
    finally:
        sys.settrace(before)


@dataclass
class EagerRun:
    """One run of the user's model: the tensors that it gave, and what Python read meanwhile."""

    outputs: list[torch.Tensor]
    reads: list[Read]


def run_eagerly(source: Source, tensors: Sequence[torch.Tensor]) -> EagerRun:
    """Run the model on flat input tensors (copies of them), leaving it as found. Raises what the model raises."""
    arguments = source.signature.arguments([t.clone() for t in tensors])
    with undisturbed(source.model), seeded(), recorded_reads() as reads:
        result = call_model(source.model, arguments)
        outputs = [t.detach().clone() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return EagerRun(outputs, reads)
