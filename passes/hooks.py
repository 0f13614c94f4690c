"""Hooks wrap a step: timing, journal, contract, numerics, dumps. No pass times, prints or verifies anything itself.

    hook(run) -> run        with        run(step, program) -> program

`wrap(run, hooks)` puts the first hook outermost.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ir_tools.errors import first_line
from ir_tools.frontends.source import Example, seeded
from ir_tools.ir import Program, check_wellformed, facts
from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.rewrite import Journal, Pass
from ir_tools.rewrite.nearest import near_misses
from ir_tools.rewrite.shapes import DECLARATIONS
from ir_tools.verify.numerics import PERFECT, Comparison, compare, smallest_sqnr
from ir_tools.verify.ranges import Observation
from ir_tools.visualize import write_dump
from passes.errors import InputError, NumericsError
from passes.report import Report, StepReport
from passes.speed import asks_for_verdict

Run = Callable[["Step", Program], Program]
Hook = Callable[[Run], Run]


class Step:
    """One pass about to run, its place in the pipeline, and the report it fills."""

    def __init__(self, index: int, pass_: Pass):
        self.index = index
        self.pass_ = pass_
        self.journal = Journal()
        self.report = StepReport(pass_.name, dict(pass_.given), pass_.declares)


def run_pass(step: Step, program: Program) -> Program:
    """The innermost run: the pass itself."""
    return step.pass_(program, journal=step.journal)  # type: ignore[no-any-return]


def wrap(run: Run, hooks: Sequence[Hook]) -> Run:
    """`run` inside all hooks, the first one outermost."""
    return functools.reduce(lambda inner, hook: hook(inner), reversed(hooks), run)


def timed(run: Run) -> Run:
    """Seconds, nodes before and after, and what the journal holds."""

    def timed_run(step: Step, program: Program) -> Program:
        step.report.nodes_before = len(program)
        start = time.perf_counter()
        after = run(step, program)
        step.report.seconds = time.perf_counter() - start
        step.report.nodes_after = len(after)
        step.report.rewrites = step.journal.rewrites
        step.report.refusals = step.journal.refusals
        step.report.casts = step.journal.casts
        return after

    return timed_run


def chosen(report: Report) -> Hook:
    """What a pass chose by measurement goes into the report."""

    def hook(run: Run) -> Run:
        def chosen_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if step.journal.choices is not None:
                report.choices = step.journal.choices
                report.notes += report.choices.notes()
            return after

        return chosen_run

    return hook


def observed(examples: Sequence[Example], calibration: Sequence[Sequence[torch.Tensor]] | None) -> Hook:
    """The magnitudes of all values, for a pass that lowers precision: on the calibration calls, or else on the examples.

    Raises `InputError` for a calibration call that fails, or gives NaN where the model gives none on the examples.
    """
    calls = [example.tensors for example in examples] if calibration is None else calibration
    what = "of the example inputs" if calibration is None else "of calibration_data"
    may_give_nan = calibration is None or any(_holds_nan(output) for example in examples for output in example.outputs)

    def hook(run: Run) -> Run:
        def observed_run(step: Step, program: Program) -> Program:
            if asks_for_ranges(step.pass_):
                observation = Observation(program)
                for i, tensors in enumerate(calls):
                    try:
                        with seeded():
                            outputs = observation.call(tensors)
                    except Exception as error:
                        if calibration is None:
                            raise
                        raise InputError(
                            f"the model fails on calibration_data[{i}]: {type(error).__name__}: {first_line(error)}"
                        ) from error
                    if not may_give_nan and any(_holds_nan(output) for output in outputs):
                        raise InputError(
                            f"the model gives NaN on calibration_data[{i}], and ranges seen there would mislead: "
                            "leave this call out, or correct it"
                        )
                step.journal.ranges = observation.ranges
                step.report.ranges = f"{len(calls)} {'call' if len(calls) == 1 else 'calls'} {what}"
            return run(step, program)

        return observed_run

    return hook


def asks_for_ranges(pass_: Pass) -> bool:
    return pass_.declares == "lower_precision"


def _holds_nan(output: torch.Tensor) -> bool:
    return bool(output.isnan().any())


@dataclass
class Fork:
    """Where the first pass that asks for a verdict on its speed changed something: what the model without it starts from.

    `program` is what the pass was given, `numerics` what was known about the numbers then.
    """

    step: Step
    program: Program
    numerics: Numerics


def forked(forks: list[Fork], numerics: Numerics) -> Hook:
    """Put the `Fork` of the pipeline into `forks`, if there is one."""

    def hook(run: Run) -> Run:
        def forked_run(step: Step, program: Program) -> Program:
            asks = not forks and asks_for_verdict(step.pass_)
            before = copy.copy(numerics)
            after = run(step, program)
            if asks and after is not program:
                forks.append(Fork(step, program, before))
            return after

        return forked_run

    return hook


def explained(where: str | None) -> Hook:
    """How near each rule came at the module path or op `where`, on the graph that the pass was given."""

    def hook(run: Run) -> Run:
        def explained_run(step: Step, program: Program) -> Program:
            if where is not None:
                step.report.near_misses = near_misses(step.pass_, program, where)
            return run(step, program)

        return explained_run

    return hook


def wellformed(run: Run) -> Run:
    """The result keeps the contract of the IR."""

    def checked_run(step: Step, program: Program) -> Program:
        after = run(step, program)
        if after is not program:
            check_wellformed(after)
        return after

    return checked_run


def announced(progress: Callable[[str], None] | None) -> Hook:
    """Tell `progress` which pass runs."""

    def hook(run: Run) -> Run:
        def announced_run(step: Step, program: Program) -> Program:
            if progress is not None:
                progress(str(step.pass_))
            return run(step, program)

        return announced_run

    return hook


def dumped(directory: Path | None, record: list[Path], notes: list[str]) -> Hook:
    """A numbered drawing after each step, new nodes coloured; drawing problems become notes, once each."""

    def hook(run: Run) -> Run:
        def dumped_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if directory is not None:
                dump(after, directory, step.index, step.pass_.name, program, record, notes)
            return after

        return dumped_run

    return hook


def dump(
    program: Program, directory: Path, index: int, name: str, previous: Program | None, record: list[Path], notes: list[str]
) -> None:
    def tell(line: str) -> None:
        if line not in notes:
            notes.append(line)

    record.extend(write_dump(program, directory, index, name, previous, tell=tell))


class Numerics:
    """Compares Programs, and at last the emitted module, with the user's own answers."""

    def __init__(self, examples: Sequence[Example], tolerance: float | None):
        self.examples = examples
        self.tolerance = tolerance
        self.declared = "reassociates"
        self.stabilised = False
        self.captured: Comparison | None = None
        self.largest = 0.0
        self.last: list[list[torch.Tensor]] = []

    def check_capture(self, program: Program) -> None:
        """The captured Program against the model; raises `NumericsError`."""
        self.largest = max(largest_product(program, example) for example in self.examples)
        self.last = self._run(program)
        self.captured = self._judge(program, self.last, "the captured graph does not give the model's numbers")

    def hook(self, run: Run) -> Run:
        def verified_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if after is program:
                return after
            self.declare([step.pass_])
            outputs = self._run(after)
            if step.pass_.declares == "exact":
                self._check_exact(program, outputs, _blame(step))
                step.report.tolerance = "bitwise"
            else:
                left_out = ", where the model gives no NaN or Inf" if self.stabilised else ""
                step.report.tolerance = f"SQNR >= {self._smallest(after):g} dB{left_out}"
            comparison = self._judge(after, outputs, _blame(step))
            step.report.max_abs_error, step.report.sqnr_db = comparison.max_abs_error, comparison.sqnr_db
            self.last = outputs
            return after

        return verified_run

    def declare(self, passes: Sequence[Pass]) -> None:
        """From here on, what the passes declare may have happened to the numbers."""
        self.declared = max((self.declared, *(p.declares for p in passes)), key=DECLARATIONS.index)
        self.stabilised = self.stabilised or any(p.declares == "stabilises" for p in passes)

    def check_emitted(self, program: Program, call: Callable[[int], list[torch.Tensor]], times: int = 3) -> Comparison:
        """The emitted module on every example, several times over: what executes may specialise as it warms up."""
        worst = PERFECT
        for _ in range(times):
            outputs = [call(i) for i in range(len(self.examples))]
            worst = worst.worse(self._judge(program, outputs, "the emitted module does not give the model's numbers"))
        return worst

    def _run(self, program: Program) -> list[list[torch.Tensor]]:
        return [run_seeded(program, example) for example in self.examples]

    def _check_exact(self, before: Program, outputs: list[list[torch.Tensor]], blame: str) -> None:
        """Bitwise equal to the step before, unless that step is not even equal to itself from run to run."""
        for example, expected, got in zip(self.examples, self.last, outputs, strict=True):
            comparison = compare(expected, got)
            if comparison.equal or not compare(expected, run_seeded(before, example)).equal:
                continue
            moved = comparison.problem or f"outputs moved by up to {comparison.max_abs_error:.3g}"
            raise NumericsError(f"{blame}: it declares 'exact', but {moved}")

    def _judge(self, program: Program, outputs: list[list[torch.Tensor]], what: str) -> Comparison:
        """Compare with the model's answers; raises `NumericsError`."""
        worst = PERFECT
        for example, got in zip(self.examples, outputs, strict=True):
            worst = worst.worse(compare(example.outputs, got, stabilised=self.stabilised))
        if worst.problem:
            raise NumericsError(f"{what}: {worst.problem}")
        # Outputs that cancel to almost nothing have no SQNR to speak of: float32's rounding of the largest product is no
        # failure. (Not that of a half dtype: an eighth of a percent of a large product would excuse any softmax.)
        rounding = torch.finfo(torch.float32).eps * self.largest
        if worst.sqnr_db < self._smallest(program) and (self.tolerance is not None or worst.max_abs_error > rounding):
            raise NumericsError(
                f"{what}: SQNR {worst.sqnr_db:.1f} dB, allowed {self._smallest(program):g} dB; "
                f"maximum absolute error {worst.max_abs_error:.3g}. Set tolerance= (dB) to allow more."
            )
        return worst

    def _smallest(self, program: Program) -> float:
        """The smallest SQNR allowed now, in dB."""
        return self.tolerance if self.tolerance is not None else smallest_sqnr(self.declared, narrowest_float(program))


def _blame(step: Step) -> str:
    text = f"the pass {step.pass_} changed the numbers too much"
    if step.journal.rewrites:
        first = step.journal.rewrites[0]
        text += f" (its first rewrite: {first.rule} at {first.module})"
    return text


def run_seeded(program: Program, example: Example) -> list[torch.Tensor]:
    """Run on copies of the inputs, which a Program may write into, with the random numbers of the model's own run."""
    with seeded():
        return program.run(*(t.clone() for t in example.tensors))


def largest_product(program: Program, example: Example) -> float:
    """The largest magnitude that a convolution, linear or matrix product of the Program gives."""
    largest = 0.0
    with seeded():
        for node, value in program.trace_values(*(t.clone() for t in example.tensors)):
            if node.op == "call_function" and short_name(node.target) in PRODUCTS and value.numel():
                largest = max(largest, value.abs().max().item())
    return largest if math.isfinite(largest) else 0.0


PRODUCTS = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul mm bmm addmm".split()
)
WIDTH = {torch.float64: 4, torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}


def narrowest_float(program: Program) -> torch.dtype:
    """The narrowest floating dtype that the graph computes in."""
    floats = [d for d in float_dtypes(program) if d in WIDTH]
    return min(floats, key=WIDTH.__getitem__, default=torch.float32)


def float_dtypes(program: Program) -> set[torch.dtype]:
    """The floating dtypes that the graph computes in."""
    found: set[Any] = {facts.dtype(n) for node in program.all_calls for n in (node, *nodes_in(node.args))}
    return {d for d in found if d is not None and d.is_floating_point}
