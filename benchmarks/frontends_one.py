"""One model of the zoo through every front end; run by `benchmarks.frontends` in a process of its own.

    python -m benchmarks.frontends_one LIST torchvision:resnet18 row.json [GIB]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from benchmarks.zoo_models import Entry
from benchmarks.zoo_one import BaseRow, eager_call, run_child
from ir_tools.errors import CaptureError, first_line
from ir_tools.frontends.capture import FRONTENDS, capture
from ir_tools.frontends.source import Source, prepare
from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import getitem, op_name
from ir_tools.ir.regions import is_region
from ir_tools.verify.numerics import SMALLEST_SQNR_DB, compare

SAME_NUMBERS_DB = SMALLEST_SQNR_DB["rounds"][torch.float32]

MOVES = frozenset(
    "aten::" + name
    for name in """alias broadcast_tensors cat chunk clone contiguous copy copy_ detach diagonal dropout expand expand_as
    feature_dropout fill fill_ flatten flip gather index index_select lift_fresh_copy movedim narrow permute pixel_shuffle
    pixel_unshuffle repeat repeat_interleave reshape roll select slice split split_with_sizes squeeze stack t to transpose
    unbind unflatten unfold unsqueeze view arange empty empty_like full full_like new_empty new_full new_ones new_zeros
    ones ones_like scalar_tensor zero zero_ zeros zeros_like""".split()
)
"""Ops that move, copy, cast or make values: these compute nothing. Nor does a dropout in eval mode."""


@dataclass
class FrontendsRow(BaseRow):
    """What the front ends made of one model: each has numbers and ops, or a refusal."""

    module = "benchmarks.frontends_one"

    sqnr_db: dict[str, float] = field(default_factory=dict)
    ops: dict[str, dict[str, int]] = field(default_factory=dict)
    """How often each front end has each op that computes from the inputs."""
    constant_ops: dict[str, dict[str, int]] = field(default_factory=dict)
    """The same of the ops that follow from no input."""
    control_flow: list[str] = field(default_factory=list)
    """The front ends whose Program has branches or loops."""
    problems: dict[str, str] = field(default_factory=dict)
    """Outputs that cannot be compared: another shape or dtype, or NaN where eager has none."""
    refusals: dict[str, str] = field(default_factory=dict)

    @property
    def captured(self) -> list[str]:
        return list(self.ops)

    @property
    def same_numbers(self) -> bool:
        """Every front end that captured the model gives eager's numbers, up to float rounding."""
        return not self.problems and all(sqnr >= SAME_NUMBERS_DB for sqnr in self.sqnr_db.values())

    @property
    def comparable(self) -> list[str]:
        """The front ends whose ops can be compared: where there are branches and loops, the Program is another one."""
        return [frontend for frontend in self.captured if frontend not in self.control_flow]

    @property
    def differing_ops(self) -> dict[str, dict[str, int]]:
        """op -> front end -> how often, of those that not all front ends have equally often."""
        return differences({frontend: self.ops[frontend] for frontend in self.comparable})

    @property
    def differing_constant_ops(self) -> dict[str, dict[str, int]]:
        """The same of the ops that follow from no input."""
        return differences({frontend: self.constant_ops[frontend] for frontend in self.comparable})

    def in_words(self) -> str:
        numbers = "" if self.same_numbers else f", NUMBERS {self.sqnr_db} {self.problems}"
        ops = f", OPS {self.differing_ops}" if self.differing_ops else ""
        return f"{' '.join(self.captured) or 'none'}{numbers}{ops}"


def differences(ops: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """op -> front end -> count, of the ops whose counts differ."""
    names = sorted({name for counted in ops.values() for name in counted})
    counts = {name: {frontend: counted.get(name, 0) for frontend, counted in ops.items()} for name in names}
    return {name: by for name, by in counts.items() if len(set(by.values())) > 1}


def compute_ops(program: Program) -> Counter[str]:
    """The ops that compute floating-point values from the inputs, by name. Integers (positions, sizes) are bookkeeping."""
    return Counter(op_name(node.target) for node in _computing(program) & _from_inputs(program))


def constant_ops(program: Program) -> Counter[str]:
    """The ops that compute floating-point values from constants alone: a trace holds their results instead."""
    return Counter(op_name(node.target) for node in _computing(program) - _from_inputs(program))


def _computing(program: Program) -> set[fx.Node]:
    return {n for n in program.calls if n.target is not getitem and op_name(n.target) not in MOVES and _gives_floats(n)}


def _from_inputs(program: Program) -> set[fx.Node]:
    """The nodes whose values depend on an input."""
    reached = {node for node in program.graph.nodes if node.op == "placeholder"}
    for node in program.calls:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _gives_floats(node: fx.Node) -> bool:
    return any(v.dtype.is_floating_point or v.dtype.is_complex for v in facts.tensors(node))


def try_frontends(entry: Entry) -> FrontendsRow:
    """Capture one model by every front end, without passes."""
    row = FrontendsRow(entry.title)
    start = time.perf_counter()
    try:
        call = eager_call(entry)
        source = prepare(call.model, [(call.args, call.kwargs)])
    except Exception as error:  # a model may raise any error; the row records it
        row.error = f"eager: {type(error).__name__}: {error}"
    else:
        for frontend in FRONTENDS:
            try_frontend(row, source, frontend)
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def try_frontend(row: FrontendsRow, source: Source, frontend: str) -> None:
    """Add to the row what one front end gives, or why it refused."""
    try:
        program = capture(source, frontend).program
        with torch.no_grad():
            comparison = compare(source.examples[0].outputs, program.run(*source.tensors))
    except CaptureError as error:
        row.refusals[frontend] = str(error)
    except Exception as error:  # captured, and cannot be run
        row.problems[frontend] = f"{type(error).__name__}: {first_line(error)}"
    else:
        row.ops[frontend] = dict(compute_ops(program))
        row.constant_ops[frontend] = dict(constant_ops(program))
        row.sqnr_db[frontend] = comparison.sqnr_db
        if comparison.problem:
            row.problems[frontend] = comparison.problem
        if any(is_region(node) for node in program.calls):
            row.control_flow.append(frontend)


if __name__ == "__main__":
    run_child(try_frontends, *sys.argv[1:])
