"""A step of the pipeline, one pass on one graph, and the hooks around it.

    hook(run) -> run        with        run(step, program) -> program

`wrap(run, hooks)` puts the first hook outermost. No pass times, prints or verifies anything itself.
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

    `artifacts`: hooks enter what the pass needs, and read what it gave.
    """

    def __init__(self, index: int, pass_: Pass):
        self.index = index
        self.pass_ = pass_
        self.log = RewriteLog()
        self.artifacts = Artifacts()
        self.report = StepReport(pass_.name, dict(pass_.given), in_order(pass_.effects))


def run_pass(step: Step, program: Program) -> Program:
    """The innermost run: the pass itself."""
    return step.pass_(program, log=step.log, artifacts=step.artifacts)


def wrap(run: Run, hooks: Sequence[Hook]) -> Run:
    """`run` inside all hooks, the first one outermost."""
    return functools.reduce(lambda inner, hook: hook(inner), reversed(hooks), run)


def run_steps(program: Program, passes: Sequence[Pass], hooks: Sequence[Hook]) -> tuple[Program, list[Step]]:
    """Run the passes in order, each inside all hooks (the first hook outermost)."""
    run = wrap(run_pass, hooks)
    steps = []
    for index, pass_ in enumerate(passes, start=1):
        step = Step(index, pass_)
        steps.append(step)
        program = run(step, program)
    return program, steps
