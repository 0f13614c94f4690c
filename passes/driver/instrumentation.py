"""The hooks of a compilation other than verification: timing, what passes need, near misses, invariants, progress, drawings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ir_tools.errors import first_line
from ir_tools.frontends.portability import factories_behind
from ir_tools.frontends.source import Example, Source
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program, check_wellformed
from ir_tools.rewrite import Pass
from ir_tools.rewrite.cast import Casts
from ir_tools.rewrite.nearest import near_misses
from ir_tools.verify.device_placement import Factories
from ir_tools.verify.ranges import Observation, Ranges
from ir_tools.visualize import write_dump
from passes.driver.step import Hook, Run, Step
from passes.errors import InputError
from passes.tune.tuning_record import TuningRecords

PROVIDED: frozenset[type] = frozenset({Ranges, Factories, TuningRecords})
"""The artifacts that these hooks make for a pass, from the Program that it is given."""


def timed(run: Run) -> Run:
    """Record seconds, nodes before and after, and the rewrite log."""

    def timed_run(step: Step, program: Program) -> Program:
        step.report.nodes_before = len(program)
        start = time.perf_counter()
        after = run(step, program)
        step.report.seconds = time.perf_counter() - start
        step.report.nodes_after = len(after)
        step.report.rewrites = step.log.rewrites
        step.report.refusals = step.log.refusals
        read_only = Casts in step.pass_.needs - step.pass_.gives
        step.report.casts = None if read_only else step.artifacts.get(Casts)
        return after

    return timed_run


def observed(examples: Sequence[Example], calibration: Sequence[Sequence[torch.Tensor]] | None) -> Hook:
    """The magnitudes of all values, for a pass that needs them: on the calibration calls, or else on the examples.

    Raises `InputError` for a calibration call that fails, or gives NaN where the model gives none on the examples.
    """
    calls = [example.tensors for example in examples] if calibration is None else calibration
    what = "of the example inputs" if calibration is None else "of calibration_data"
    may_give_nan = calibration is None or any(_holds_nan(output) for example in examples for output in example.outputs)

    def hook(run: Run) -> Run:
        def observed_run(step: Step, program: Program) -> Program:
            if needs_ranges(step.pass_):
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
                step.artifacts.put(Ranges(observation.ranges))
                step.report.ranges = f"{len(calls)} {'call' if len(calls) == 1 else 'calls'} {what}"
            return run(step, program)

        return observed_run

    return hook


def placed(source: Source) -> Hook:
    """Where the model's factory ops put their tensors, for a pass that needs it."""

    def hook(run: Run) -> Run:
        def placed_run(step: Step, program: Program) -> Program:
            if Factories in step.pass_.needs:
                step.artifacts.put(factories_behind(source, program))
            return run(step, program)

        return placed_run

    return hook


def needs_ranges(pass_: Pass) -> bool:
    return Ranges in pass_.needs or pass_.reads_log_ranges


def _holds_nan(output: torch.Tensor) -> bool:
    return bool(output.isnan().any())


def explained(where: str | None) -> Hook:
    """How near each rule came at the module path or op `where`, on the graph that the pass was given."""

    def hook(run: Run) -> Run:
        def explained_run(step: Step, program: Program) -> Program:
            if where is not None:
                step.report.near_misses = near_misses(step.pass_, program, where)
            return run(step, program)

        return explained_run

    return hook


def replayed(tuning_records: str | os.PathLike[str]) -> Hook:
    """The tuning records of an earlier run, for the first pass that needs some; later ones are given what it gave."""

    def hook(run: Run) -> Run:
        def replaying_run(step: Step, program: Program) -> Program:
            if TuningRecords in step.pass_.needs and TuningRecords not in step.artifacts:
                step.artifacts.put(TuningRecords.load(tuning_records))
            return run(step, program)

        return replaying_run

    return hook


def wellformed(run: Run) -> Run:
    """Check that the result keeps the invariants of the IR."""

    def checked_run(step: Step, program: Program) -> Program:
        after = run(step, program)
        if after is not program:
            check_wellformed(after)
        return after

    return checked_run


def announced(progress: Callable[[str], None] | None) -> Hook:
    """Pass the name of each pass to `progress` before it runs."""

    def hook(run: Run) -> Run:
        def announced_run(step: Step, program: Program) -> Program:
            if progress is not None:
                progress(str(step.pass_))
            return run(step, program)

        return announced_run

    return hook


class Drawings:
    """Numbered drawings of the graph: as captured, and by its hook after each step, new nodes coloured.

    `files` are those written; `notes` say, once each, what could not be drawn.
    """

    def __init__(self, directory: Path | None):
        self.directory = directory
        self.files: list[Path] = []
        self.notes: list[str] = []

    def hook(self, run: Run) -> Run:
        def drawn_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            self.draw(after, step.index, step.pass_.name, program)
            return after

        return drawn_run

    def draw(self, program: Program, index: int, name: str, previous: Program | None) -> None:
        """Draw one graph, if drawings were asked for; `previous` is what it is compared with."""
        if self.directory is not None:
            self.files += write_dump(program, self.directory, index, name, previous, report=self._note)

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)
