"""Whether a pass that is meant for speed brings any: the model is compiled without it too, and both are timed in turn.

The first pass that has an option `on_slower` and changed something forks the pipeline: a hook keeps the Program before that
pass, and the rest of the pipeline runs on that Program too.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ir_tools.errors import first_line
from ir_tools.ir import Program
from ir_tools.ir.program import all_nodes
from ir_tools.rewrite import Artifacts, Pass
from passes.driver.compilation import CompilationContext, CompilationResult, notes_of
from passes.driver.instrumentation import announced
from passes.driver.step import Run, Step
from passes.driver.verification import Numerics, float_dtypes
from passes.tune.speed_comparison import Candidate, Speed, asks_for_speed_comparison, decide


@dataclass
class Fork:
    """The start of the model without the pass of `step`: the Program before that pass, its numbers, and copies of what the
    passes before it gave (`handed_down`), or why these cannot be copied."""

    step: Step
    program: Program
    numerics: Numerics
    handed_down: Artifacts | Exception


class Forking:
    """A hook that keeps the `fork` of a pipeline, None where no pass that asks for a comparison changed anything."""

    def __init__(self, numerics: Numerics):
        self.numerics = numerics
        self.fork: Fork | None = None

    def hook(self, run: Run) -> Run:
        def forking_run(step: Step, program: Program) -> Program:
            asks = self.fork is None and asks_for_speed_comparison(step.pass_)
            if not asks:
                return run(step, program)
            numerics, handed_down = copy.copy(self.numerics), _copied(step.handed_down, program)
            after = run(step, program)
            if after is not program:
                self.fork = Fork(step, program, numerics, handed_down)
            return after

        return forking_run


def _copied(artifacts: Artifacts, program: Program) -> Artifacts | Exception:
    """Copies of artifacts, into which passes may write. Nodes of the Program stay those that they are: it never changes."""
    same = {id(part): part for part in (program, program.graph, *all_nodes(program.graph))}
    try:
        return copy.deepcopy(artifacts, same)
    except Exception as error:
        return error


def faster(
    context: CompilationContext,
    result: CompilationResult,
    fork: Fork,
    pipeline: Sequence[Pass],
    progress: Callable[[str], None],
) -> tuple[Speed, CompilationResult]:
    """The speed comparison, and the result to give: `result`, or the one without the pass at which the pipeline forked.

    Only that pass is left out. Later ones that ask for a comparison too are in both, and are not compared.
    """
    clock = time.perf_counter()
    pass_ = fork.step.pass_
    dtype, reference = _speed_names(pass_, fork.program)
    aside = announced(lambda line: progress(f"without {pass_.name}: {line}"))
    at = fork.step.index
    rest = pipeline[at:]
    try:
        if isinstance(fork.handed_down, Exception):
            raise fork.handed_down
        other = context.run_passes(fork.program, rest, fork.numerics, [aside], fork.handed_down)
        progress(f"emitting TorchScript without {pass_.name}")
        other = context.emitted(other)
        dtype, reference = _speed_names(pass_, other.program)
        progress(f"timing the model without {pass_.name} and with it in turn")
        without, with_pass = (Candidate(r.program, r.scripted, context.arguments[0]) for r in (other, result))
        speed = decide(pass_, dtype, reference, without, with_pass)
    except Exception as error:  # the model is there and verified; only what it would be compared with is not
        speed = Speed(pass_.name, dtype, reference, "unknown", reason=f"{type(error).__name__}: {first_line(error)}")
    speed = replace(speed, seconds=time.perf_counter() - clock)
    if speed.decision != "reverted":
        return speed, replace(result, notes=[*result.notes, *_not_compared(rest, result.steps[at:])])
    reverted = copy.copy(fork.step)
    reverted.report = replace(fork.step.report, reverted=str(speed))
    before = result.steps[: at - 1]
    notes = dict.fromkeys([*notes_of(before), *other.notes, *_not_compared(rest, other.steps)])
    return speed, replace(other, steps=[*before, reverted, *other.steps], notes=list(notes))


def _not_compared(passes: Sequence[Pass], steps: Sequence[Step]) -> list[str]:
    """A line for each later pass that asks for a comparison too."""
    asked = [p for p, step in zip(passes, steps, strict=True) if asks_for_speed_comparison(p) and step.report.rewrote]
    why = "its speed was not compared and its on_slower not read; only the first pass with on_slower is compared"
    return [f"{p}: {why}" for p in asked]


def _speed_names(pass_: Pass, reference: Program) -> tuple[str, str]:
    """What `Speed` calls the dtype that the pass brings, and that of the model without it; "" for what has no such name."""
    if "dtype" not in pass_.options:
        return "", ""
    dtype = pass_.given.get("dtype", pass_.options["dtype"])
    return str(dtype).removeprefix("torch."), "float32" if float_dtypes(reference) == {torch.float32} else ""
