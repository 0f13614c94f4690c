"""One compilation: a captured Program through the passes, each step verified; then emitted, and verified again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ir_tools.emit import package
from ir_tools.emit.calling import arguments_for
from ir_tools.frontends.source import Source
from ir_tools.ir import Program
from ir_tools.ir.dialect import short_name
from ir_tools.ir.prepack import is_prepack
from ir_tools.rewrite import Artifacts, Pass
from ir_tools.rewrite.notes import Notes
from passes.driver.compiled_model import call_flat
from passes.driver.instrumentation import PROVIDED, explained, observed, placed, replayed, timed, wellformed
from passes.driver.step import Hook, Step, run_steps
from passes.driver.verification import Numerics
from passes.lower.target import Target
from passes.report.report import Report
from passes.tune.tuning_record import TuningRecords


@dataclass(frozen=True)
class CompilationResult:
    """The Program that the passes left, the steps to it, and, once it is emitted, the TorchScript module.

    - `ops_left`: how often each op occurs in the Program. `tuning_records`: what its lowering measured or replayed.
    - `golden`: the outputs of the emitted module on the first example. `sqnr_db`, `max_abs_error`: its numbers, verified.
    """

    program: Program
    numerics: Numerics
    steps: list[Step]
    ops_left: dict[str, int]
    tuning_records: TuningRecords | None = None
    notes: list[str] = field(default_factory=list)
    scripted: Any = None
    golden: list[torch.Tensor] = field(default_factory=list)
    sqnr_db: float | None = None
    max_abs_error: float | None = None

    def report_to(self, report: Report) -> None:
        """Enter what is known of this compilation into the report of the whole run."""
        report.steps, report.ops_left = [s.report for s in self.steps], self.ops_left
        report.tuning_records = self.tuning_records
        report.sqnr_db, report.max_abs_error = self.sqnr_db, self.max_abs_error
        report.notes += self.notes


@dataclass(frozen=True)
class CompilationContext:
    """What all compilations of one captured model have in common.

    `observe_on`: the calibration calls, as flat tensors; None where the example inputs are observed. `tuning_records`: the file
    whose records are replayed.
    """

    source: Source
    target: Target
    verify: str
    explain_at: str | None
    observe_on: Sequence[Sequence[torch.Tensor]] | None
    tuning_records: str | os.PathLike[str] | None = None

    @property
    def arguments(self) -> list[list[Any]]:
        """Those of the emitted module, per example."""
        return [arguments_for(self.source.signature, example.tensors) for example in self.source.examples]

    def run_passes(
        self,
        program: Program,
        pipeline: Sequence[Pass],
        numerics: Numerics,
        outer: Sequence[Hook],
        handed_down: Artifacts | None = None,
    ) -> CompilationResult:
        """Run the passes under the hooks `outer` and the usual ones. `handed_down` is what passes before them gave."""
        hooks = [*outer, explained(self.explain_at), observed(self.source.examples, self.observe_on), placed(self.source)]
        hooks += [] if self.tuning_records is None else [replayed(self.tuning_records)]
        hooks += [numerics.hook] if self.verify == "each" else []
        hooks += [numerics.allowing] if self.verify != "off" else []
        program, steps = run_steps(program, pipeline, [*hooks, wellformed, timed], handed_down)
        tuned = [records for step in steps if (records := step.artifacts.get(TuningRecords)) is not None]
        return CompilationResult(program, numerics, steps, count_ops(program), tuned[-1] if tuned else None, notes_of(steps))

    def emitted(self, result: CompilationResult) -> CompilationResult:
        """The result with the TorchScript module of its Program, verified."""
        scripted = package.round_trip(self.target.emitter(result.program))
        arguments = self.arguments
        sqnr_db = max_abs_error = None
        with torch.no_grad():
            if self.verify != "off":
                comparison = result.numerics.check_emitted(result.program, lambda i: call_flat(scripted, arguments[i]))
                sqnr_db, max_abs_error = comparison.sqnr_db, comparison.max_abs_error
            golden = call_flat(scripted, arguments[0])
        return replace(result, scripted=scripted, golden=golden, sqnr_db=sqnr_db, max_abs_error=max_abs_error)


def notes_of(steps: Sequence[Step]) -> list[str]:
    """What the user should know about these steps, each line once."""
    missing = [
        f"{step.pass_} needs {kind.__name__}, and the passes before it gave none: it got an empty one"
        for step in steps
        for kind in sorted(step.missing - PROVIDED, key=lambda kind: kind.__name__)
    ]
    tuned = [line for step in steps for line in step.artifacts.get(TuningRecords, TuningRecords()).notes()]
    noted = [line for step in steps for line in step.artifacts.get(Notes, Notes()).lines]
    return list(dict.fromkeys([*missing, *tuned, *noted]))


def count_ops(program: Program) -> dict[str, int]:
    """How often each op that runs in a call occurs, by name; in branches and loops too. Prepack ops run before."""
    return dict(Counter(short_name(node.target) for node in program.all_calls if not is_prepack(node)))
