"""A step of the pipeline, one pass on one graph, and the hooks around it.

    hook(run) -> run        with        run(step, program) -> program

`wrap(run, hooks)` puts the first hook outermost. No pass times, prints or verifies anything itself.

What a step gives, the later steps of a compilation that need it are given: `handed_down`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from ir_tools.ir import Program
from ir_tools.rewrite import Artifacts, Pass, RewriteLog
from ir_tools.rewrite.numeric_effects import in_order
from passes.report.data import StepReport

Run = Callable[["Step", Program], Program]
Hook = Callable[[Run], Run]


class Step:
    """One pass to run, its position in the pipeline, and the report it fills.

    `artifacts`: hooks enter what the pass needs, and read what it gave. From the start it has what it needs of `handed_down`,
    which is what earlier passes gave. `missing`: the classes it needed that nobody gave it, so that it was given empty ones.
    """

    def __init__(self, index: int, pass_: Pass, handed_down: Artifacts | None = None):
        self.index = index
        self.pass_ = pass_
        self.log = RewriteLog()
        self.missing: frozenset[type] = frozenset()
        self.handed_down = Artifacts() if handed_down is None else handed_down
        self.artifacts = Artifacts(*(a for a in self.handed_down if type(a) in pass_.needs))
        self.report = StepReport(pass_.name, dict(pass_.given), in_order(pass_.effects))


def run_pass(step: Step, program: Program) -> Program:
    """The innermost run: the pass itself. What it gave is handed down, instead of what earlier passes gave."""
    step.missing = step.pass_.needs - {type(artifact) for artifact in step.artifacts}
    after = step.pass_(program, log=step.log, artifacts=step.artifacts)
    for artifact in step.artifacts:
        if type(artifact) in step.pass_.gives:
            step.handed_down.put(artifact)
    return after


def wrap(run: Run, hooks: Sequence[Hook]) -> Run:
    """`run` inside all hooks, the first one outermost."""
    return functools.reduce(lambda inner, hook: hook(inner), reversed(hooks), run)


def run_steps(
    program: Program, passes: Sequence[Pass], hooks: Sequence[Hook], handed_down: Artifacts | None = None
) -> tuple[Program, list[Step]]:
    """Run the passes in order, each inside all hooks (the first hook outermost).

    `handed_down` is what passes before them gave.
    """
    run = wrap(run_pass, hooks)
    steps: list[Step] = []
    handed_down = Artifacts() if handed_down is None else handed_down
    for index, pass_ in enumerate(passes, start=1):
        step = Step(index, pass_, handed_down)
        steps.append(step)
        program = run(step, program)
    return program, steps
