"""One model of the zoo, from eager to the reloaded file; run by `benchmarks.zoo` in a process of its own.

    python -m benchmarks.zoo_one LIST torchvision:resnet18 row.json [GIB]

writes one row to row.json, whatever happens to the model; with GIB the process may hold no more than that much memory.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from benchmarks.zoo_models import Entry, read_list
from ir_tools.ir.signature import result_tensors
from ir_tools.verify.numerics import SMALLEST_GOLDEN_SQNR_DB, SMALLEST_SQNR_DB, Comparison, compare
from passes import DEFAULT, Report, load, optimize

FULL = (*DEFAULT[: DEFAULT.index("fuse_attention")], "merge_parallel_linears", *DEFAULT[DEFAULT.index("fuse_attention") :])
"""All that changes no precision, the pass that pays on other devices than a CPU too."""
HALF = (*FULL, "cast_half")
FULL_SQNR_DB = SMALLEST_SQNR_DB["rounds"][torch.float32]


AnyRow = TypeVar("AnyRow", bound="BaseRow")


@dataclass
class BaseRow:
    """A line of a table over the zoo. `error` is empty when everything held; else it opens with the step that failed."""

    module: ClassVar[str]
    """What makes such a row, in a process of its own."""

    model: str
    seconds: float = field(default=0.0, kw_only=True)
    error: str = field(default="", kw_only=True)

    def to_json(self) -> str:
        """One line; an infinite SQNR (equal outputs) is the string "inf", which JSON can hold."""
        return json.dumps(_written(asdict(self)))

    @classmethod
    def from_dict(cls: type[AnyRow], found: dict[str, Any]) -> AnyRow:
        return cls(**_read(found))

    def in_words(self) -> str:
        """A row without error, in words."""
        raise NotImplementedError


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _written(part) for name, part in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _read(part) for name, part in value.items()}
    return float(value) if value in ("inf", "-inf", "nan") else value


@dataclass
class Row(BaseRow):
    """The result for one model."""

    module = "benchmarks.zoo_one"

    frontend: str = ""
    nodes: int = 0
    rewrites: int = 0
    refusals: int = 0
    sqnr_db: float | None = None
    half_sqnr_db: float | None = None
    norms: int = 0
    norms_left: int = 0
    fired: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)

    def in_words(self) -> str:
        return f"{self.frontend}, {self.nodes} nodes, {decibel(self.sqnr_db)} dB, half {decibel(self.half_sqnr_db)} dB"


def decibel(value: float | None) -> str:
    return "" if value is None else "equal" if value == math.inf else f"{value:.1f}"


class Miss(Exception):
    """The model went through, and its numbers are not what they must be."""


@dataclass
class Call:
    """A model, one call of it, and the tensors that it answers eagerly."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: list[torch.Tensor]


def try_model(entry: Entry) -> Row:
    """Build, run, optimise, save and reload one model, in float32 and in half precision."""
    row = Row(entry.title)
    start = time.perf_counter()
    step = "eager"
    try:
        call = eager_call(entry)
        step = "float32"
        report, row.sqnr_db = compiled(call, FULL, torch.float32, tolerance=FULL_SQNR_DB)
        row.frontend, row.nodes = report.frontend, report.captured_nodes
        own = [done for done in report.steps if not done.name.startswith("lower_")]
        row.rewrites = sum(len(done.rewrites) for done in own)
        row.refusals = sum(len(done.refusals) for done in own)
        row.norms, row.norms_left = (ops.get("batch_norm", 0) for ops in (report.captured_ops, report.ops_left))
        row.fired = {done.name: len(done.rewrites) for done in own if done.rewrites}
        row.refused = dict(Counter(f"{done.name}: {refusal.reason}" for done in own for refusal in done.refusals))
        step = "half"
        _, row.half_sqnr_db = compiled(call, HALF, torch.bfloat16, tolerance=None)
    except Exception as error:  # a model may raise any error; the row records it
        row.error = f"{step}: {type(error).__name__}: {error}"
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def eager_call(entry: Entry) -> Call:
    """The entry's model and what it answers."""
    model = entry.build()
    args, kwargs = entry.arguments()
    with torch.no_grad():
        expected = result_tensors(model(*args, **kwargs))
    if not any(t.is_floating_point() and t.numel() and t.min() != t.max() for t in expected):
        raise Miss("every output is constant, so that a comparison proves nothing")
    return Call(model, args, kwargs, expected)


def compiled(call: Call, passes: tuple[str, ...], dtype: torch.dtype, tolerance: float | None) -> tuple[Report, float]:
    """Optimise, save and reload: the report, and the SQNR in dB of the reloaded model against the eager one.

    `optimize` itself raises when the numbers are out of tolerance; here the reloaded file must give those same numbers.
    """
    args = call.args or None
    fast = optimize(call.model, passes, example_inputs=args, example_kwargs=call.kwargs, tolerance=tolerance)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = Path(folder) / "model.pt"
        fast.save(file)
        reloaded = result_tensors(load(file)(*_tensors(call.args), **_tensors(call.kwargs)))
        optimised = result_tensors(fast(*call.args, **call.kwargs))
    _expect(compare(optimised, reloaded), SMALLEST_GOLDEN_SQNR_DB[dtype], "the reloaded file differs from the optimised model")
    comparison = compare(call.expected, reloaded)
    if tolerance is not None:
        _expect(comparison, tolerance, "the reloaded file differs from the eager model")
    return fast.report, comparison.sqnr_db


def _tensors(arguments: Any) -> Any:
    """A file takes tensors alone: other arguments are baked in."""
    if isinstance(arguments, dict):
        return {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return [value for value in arguments if isinstance(value, torch.Tensor)]


def _expect(comparison: Comparison, smallest: float, what: str) -> None:
    if comparison.problem or comparison.sqnr_db < smallest:
        raise Miss(f"{what}: {comparison.problem or f'SQNR {comparison.sqnr_db:.1f} dB, allowed {smallest:g} dB'}")


def run_child(try_entry: Callable[[Entry], BaseRow], list_file: str, title: str, result: str, gib: str = "") -> None:
    """Write the row of `title` to the file `result`, holding no more than `gib` of memory."""
    if gib:
        limit = int(float(gib) * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    warnings.simplefilter("ignore")
    entry = next(e for e in read_list(Path(list_file)) if e.title == title)
    Path(result).write_text(try_entry(entry).to_json())


if __name__ == "__main__":
    run_child(try_model, *sys.argv[1:])
