"""Numeric verification: Programs after each step, and the emitted module, are compared with the user's own model.

    total allowance     of all steps so far, against the model          what was lowered once stays lowered
    own allowance       of one step, against the step before            what was lowered before excuses nothing

Both come from the table of `ir_tools.verify.numerics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ir_tools.frontends.source import Example
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program, facts
from ir_tools.ir.dialect import nodes_in, short_name
from ir_tools.rewrite import Pass
from ir_tools.rewrite.numeric_effects import NumericEffects
from ir_tools.verify.numerics import PERFECT, SMALLEST_SQNR_DB, Comparison, compare, smallest_sqnr
from passes.driver.step import Run, Step
from passes.errors import NumericsError

ROUNDS: NumericEffects = frozenset({"rounds"})
"""The effects of capturing and of emitting: sums may be added in another order."""


LOWERS: NumericEffects = frozenset({"lowers_precision", "quantizes"})
"""The effects by which values may be held in fewer bits than before."""

ONE_BIT = 6.0
"""In dB. Two roundings of a number, each as far off as one of them was measured to be, are at most this much farther apart."""


class Numerics:
    """Compares Programs, and finally the emitted module, with the outputs of the user's model.

    `smallest` is the total allowance, the smallest SQNR in dB. `lowered` is what the last step that lowers precision left,
    against the model: later steps round values that carry this noise, so that no step can be asked for less noise than that.
    """

    def __init__(self, examples: Sequence[Example], tolerance: float | None):
        self.examples = examples
        self.tolerance = tolerance
        self.smallest = math.inf
        self.where_finite = False
        self.captured: Comparison | None = None
        self.largest = 0.0
        self.last: list[list[torch.Tensor]] = []
        self.lowered = math.inf

    def check_capture(self, program: Program) -> None:
        """The captured Program against the model; raises `NumericsError`."""
        self.largest = max(largest_product(program, example) for example in self.examples)
        self.smallest = smallest_sqnr(ROUNDS, compared_dtypes(program))
        self.last = self._run(program)
        self.captured = self._judge(self.last, "the captured graph does not give the model's numbers")

    def allowing(self, run: Run) -> Run:
        """A hook: what each pass may do to numbers is allowed from then on. Raises as `check_precision` does."""

        def allowed_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if after is not program:
                check_precision(step.pass_, program, after)
                self.smallest = min(self.smallest, allowance(step.pass_.effects, program, after))
                self.where_finite |= _may_become_finite(step.pass_)
            return after

        return allowed_run

    def hook(self, run: Run) -> Run:
        """A hook around `allowing`: the numbers after each pass."""

        def verified_run(step: Step, program: Program) -> Program:
            after = run(step, program)
            if after is program:
                return after
            outputs = self._run(after)
            left_out = ", where the model gives no NaN or Inf" if self.where_finite else ""
            if moves_nothing(step.pass_):
                self._check_unmoved(step.pass_, program, outputs, _blame(step))
                step.report.tolerance = "bitwise" if step.pass_.is_exact else f"bitwise{left_out}"
            else:
                self._check_step(step.pass_, program, after, outputs, _blame(step))
                step.report.tolerance = f"SQNR >= {self._allowed(self.smallest):g} dB{left_out}"
            comparison = self._judge(outputs, _blame(step))
            step.report.max_abs_error, step.report.sqnr_db = comparison.max_abs_error, comparison.sqnr_db
            if step.pass_.effects & LOWERS:
                self.lowered = comparison.sqnr_db
            self.last = outputs
            return after

        return verified_run

    def check_emitted(self, program: Program, call: Callable[[int], list[torch.Tensor]], times: int = 3) -> Comparison:
        """The emitted module on every example, several times over: what executes may specialise as it warms up."""
        self.smallest = min(self.smallest, allowance(ROUNDS, program, program))
        worst = PERFECT
        for _ in range(times):
            outputs = [call(i) for i in range(len(self.examples))]
            worst = worst.worse(self._judge(outputs, "the emitted module does not give the model's numbers"))
        return worst

    def _run(self, program: Program) -> list[list[torch.Tensor]]:
        return [run_seeded(program, example) for example in self.examples]

    def _check_unmoved(self, pass_: Pass, before: Program, outputs: list[list[torch.Tensor]], blame: str) -> None:
        """Bitwise equal to the step before, unless that step is not even equal to itself from run to run.

        Where that step gives NaN or Inf, a pass that may turn these into numbers is free.
        """
        said = "exact" if pass_.is_exact else "exact but for NaN and Inf"
        for example, expected, got in zip(self.examples, self.last, outputs, strict=True):
            comparison = compare(expected, got, where_finite=_may_become_finite(pass_))
            if comparison.equal or not compare(expected, run_seeded(before, example)).equal:
                continue
            moved = comparison.problem or f"outputs moved by up to {comparison.max_abs_error:.3g}"
            raise NumericsError(f"{blame}: it is declared {said}, but {moved}")

    def _check_step(self, pass_: Pass, before: Program, after: Program, outputs: list[list[torch.Tensor]], blame: str) -> None:
        """Against the step before, by the effects of this step alone, where earlier steps were allowed more than it is."""
        own, free = allowance(pass_.effects, before, after), _may_become_finite(pass_)
        if own <= self.smallest and free >= self.where_finite:
            return  # the model is the stricter reference, or as strict
        worst = PERFECT
        for expected, got in zip(self.last, outputs, strict=True):
            worst = worst.worse(compare(expected, got, where_finite=free))
        own = min(own, self.lowered - ONE_BIT, math.inf if self.tolerance is None else self.tolerance)
        self._refuse_beyond(worst, own, f"{blame}, against the step before")

    def _judge(self, outputs: list[list[torch.Tensor]], what: str) -> Comparison:
        """Compare with the model's outputs; raises `NumericsError`."""
        worst = PERFECT
        for example, got in zip(self.examples, outputs, strict=True):
            worst = worst.worse(compare(example.outputs, got, where_finite=self.where_finite))
        self._refuse_beyond(worst, self._allowed(self.smallest), what)
        return worst

    def _refuse_beyond(self, worst: Comparison, smallest: float, what: str) -> None:
        if worst.problem:
            raise NumericsError(f"{what}: {worst.problem}")
        # Outputs that cancel to almost nothing have no meaningful SQNR: float32's rounding of the largest product is no
        # failure. (Not that of a half dtype: an eighth of a percent of a large product would excuse any softmax.)
        rounding = torch.finfo(torch.float32).eps * self.largest
        if worst.sqnr_db < smallest and (self.tolerance is not None or worst.max_abs_error > rounding):
            raise NumericsError(
                f"{what}: SQNR {worst.sqnr_db:.1f} dB, allowed {smallest:g} dB; "
                f"maximum absolute error {worst.max_abs_error:.3g}. Set tolerance= (dB) to allow more."
            )

    def _allowed(self, smallest: float) -> float:
        """The smallest SQNR allowed against the model, in dB."""
        return self.tolerance if self.tolerance is not None else smallest


def _may_become_finite(pass_: Pass) -> bool:
    return "non_finite_may_become_finite" in pass_.effects


def moves_nothing(pass_: Pass) -> bool:
    """No effect of the pass moves a finite number."""
    return not pass_.effects & SMALLEST_SQNR_DB.keys()


def allowance(effects: NumericEffects, before: Program, after: Program) -> float:
    """The smallest SQNR that a step of these effects may leave, in dB: rounding by the float dtypes that were there before it,
    lower precision by those behind it."""
    return min(
        smallest_sqnr(effects & ROUNDS, compared_dtypes(before)), smallest_sqnr(effects - ROUNDS, compared_dtypes(after))
    )


def check_precision(pass_: Pass, before: Program, after: Program) -> None:
    """Raise `NumericsError` where a pass computes in fewer bits than the graph did, and its effects do not say so."""
    coarsest = max(map(_eps, float_dtypes(before)), default=torch.finfo(torch.float32).eps)
    new = sorted((d for d in float_dtypes(after) if _eps(d) > coarsest), key=_eps)
    if new and not pass_.effects & LOWERS:
        dtype = str(new[-1]).removeprefix("torch.")
        raise NumericsError(
            f"the pass {pass_} computes in {dtype}, a lower precision than the graph had before it, and its effects do not say "
            "so: add 'lowers_precision', or 'quantizes'"
        )


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _blame(step: Step) -> str:
    text = f"the pass {step.pass_} changed the numbers too much"
    if step.log.rewrites:
        first = step.log.rewrites[0]
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
    return min(compared_dtypes(program), key=WIDTH.__getitem__)


def compared_dtypes(program: Program) -> set[torch.dtype]:
    """The floating dtypes that the graph computes in and the tables of tolerances know; float32 where there is none."""
    return float_dtypes(program) & WIDTH.keys() or {torch.float32}


def float_dtypes(program: Program) -> set[torch.dtype]:
    """The floating dtypes that the graph computes in; those of the parts of complex numbers too."""
    calls = program.all_calls
    found: set[Any] = {facts.dtype(n) for c in calls for n in (c, *nodes_in([*c.args, *c.kwargs.values()]))}
    return {d.to_real() for d in found if d is not None and (d.is_floating_point or d.is_complex)}
