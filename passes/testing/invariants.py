"""The invariants of every pass, checked on one Program.

    the input is left untouched               the result is well-formed
    `after is before` iff nothing is reported the facts of the result are true
    a second run returns the very object      the numbers differ by its effects alone
    a site that is skipped is left alone      the docstring opens with an equation or a table

An invariant that does not hold raises `InvariantBroken`, with a sentence that names the pass and the invariant.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ir_tools.errors import PassesError
from ir_tools.frontends.source import Example
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program, check_wellformed, facts
from ir_tools.ir.program import all_nodes
from ir_tools.rewrite import Artifacts, Pass, RewriteLog
from ir_tools.rewrite.numeric_effects import NumericEffects
from ir_tools.torch_compat.dispatch import TorchDispatchMode
from ir_tools.torch_compat.operators import schema_of
from ir_tools.verify.numerics import compare, smallest_sqnr
from passes.driver.verification import ROUNDS, compared_dtypes, narrowest_float, run_seeded
from passes.testing.true_facts import sketch, untrue_facts

LARGEST_ERROR = 1e-10
"""What reassociation may do to float64, as the largest |difference| over the largest |reference| of an output."""

NOISE_ALLOWED = 100.0
"""A difference of so many times what rounding alone does to an output is the fault of the model: it amplifies rounding."""

NOISE_ALLOWED_HALF = 10.0
"""The same for half dtypes, in which a hundred times the rounding is the whole value."""


class InvariantBroken(PassesError, AssertionError):
    """A pass broke one of the invariants; the message names both. `kind` is equal for equal causes."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


# -- invariants that need no reference ----------------------------------------------------------------------------------


def rewritten(
    pass_: Pass, program: Program, *inputs: Tensor, skip: Iterable[str] = (), artifacts: Artifacts | None = None
) -> tuple[Program, RewriteLog]:
    """Run a pass and check the invariants that need no reference; return the new Program and the rewrite log.

    `inputs` are flat tensors of one call: the new Program is run on copies of them. `artifacts` have what the pass needs, and
    get what it gives. Raises `InvariantBroken`.

    >>> import passes
    >>> from ir_tools.frontends.capture import capture
    >>> from ir_tools.frontends.source import prepare
    >>> x = torch.randn(2, 3)
    >>> program = capture(prepare(torch.nn.Dropout().eval(), [((x,), {})]), "trace").program
    >>> after, log = rewritten(passes.CATALOGUE["remove_dropout"], program, x)
    >>> len(after.calls), len(log.rewrites)
    (0, 1)
    """
    skip = frozenset(skip)
    before, log = fingerprint(program), RewriteLog.skipping(skip)
    artifacts = Artifacts() if artifacts is None else artifacts
    needed = list(artifacts)
    after = pass_(program, log=log, artifacts=artifacts)
    if fingerprint(program) != before:
        raise InvariantBroken(f"{pass_} changed its input")
    if not log.rewrites and after is not program:
        raise InvariantBroken(f"{pass_} gave a new Program, but reports no rewrite")
    if log.rewrites and after is program:
        raise InvariantBroken(f"{pass_} reports {len(log.rewrites)} rewrites, but gave back the Program it came from")
    if after is not program:
        check_wellformed(after)
        assert_facts_are_true(after, *inputs)
    again = RewriteLog.skipping(skip)
    if pass_(after, log=again, artifacts=Artifacts(*needed)) is not after:
        found = f": {again.rewrites[0].rule} at {again.rewrites[0].module}" if again.rewrites else ""
        raise InvariantBroken(f"a second run of {pass_} found more to do{found}")
    return after, log


def fingerprint(program: Program) -> list[Any]:
    """Everything that a pass might change in its input: nodes in order, arguments, facts, origins, constants by value.

    The nodes of a region's bodies are among them.
    """
    nodes = [
        (n.name, n.op, str(n.target), str(n.args), str(n.kwargs), n.meta.get("provenance"), sketch(facts.fact(n)))
        for n in all_nodes(program.graph)
    ]
    constants = [(name, id(t), t.dtype, _content(t)) for name, t in program.constants.items()]
    return [nodes, constants, sorted(program.state), program.signature]


def _content(tensor: Tensor) -> str:
    """The values as text, in which NaN is equal to itself."""
    return str(tensor.detach().clone().flatten().tolist())


def assert_facts_are_true(program: Program, *inputs: Tensor) -> None:
    """Run the Program and compare shape, dtype and strides of every value with what its node says. Raises `InvariantBroken`."""
    if wrong := untrue_facts(program, *inputs):
        raise InvariantBroken("facts are not true: " + "\n".join(wrong))


def check_docstring(pass_: Pass) -> None:
    """A sentence, an empty line, and an equation or table, indented by four. Raises `InvariantBroken`."""
    lines = pass_.doc.strip().splitlines()
    opens = len(lines) > 2 and lines[0].endswith(".") and not lines[1].strip() and lines[2].startswith("    ")
    if not opens or ("->" not in pass_.equation and len(pass_.equation.splitlines()) < 2):
        raise InvariantBroken(
            f"the docstring of {pass_} must open with a sentence, an empty line, and an equation (`left -> right`) or table"
        )


def check_skipping(pass_: Pass, program: Program, log: RewriteLog, *, most: int = 1) -> None:
    """The first `most` sites of the rewrite log, skipped one by one, are left alone; all skipped, nothing happens.

    Raises `InvariantBroken`. A site that needs another one is left alone when that one is.
    """
    sites = [rewrite.site for rewrite in log.rewrites]
    for site in sites[:most]:
        left = RewriteLog.skipping({site})
        check_wellformed(pass_(program, log=left))
        if site in [rewrite.site for rewrite in left.rewrites]:
            raise InvariantBroken(f"{pass_} rewrote the site {site}, which was to be skipped")
    if sites and len(set(sites)) != len(sites):
        raise InvariantBroken(f"{pass_} has two sites of one name: {max(sites, key=sites.count)}")


# -- numbers ------------------------------------------------------------------------------------------------------------


@dataclass
class Oracle:
    """The user's model run eagerly: what its outputs are on one call, and how much rounding alone moves them.

    `captured` is the Program as captured, before any pass; `example` the call, with the model's own answers.
    """

    captured: Program
    example: Example

    def judge(self, program: Program, outputs: Sequence[Tensor], effects: NumericEffects, what: str) -> None:
        """Raise `InvariantBroken`, beginning with `what`, unless `outputs` are the model's but for `effects` of passes.

        Where all is float64, the relative error is at most `LARGEST_ERROR`; in narrower dtypes the SQNR is at least that of
        the table in `ir_tools.verify.numerics`. A model that amplifies rounding errors is allowed more.
        """
        effects |= ROUNDS  # front ends may reorder sums too
        where_finite = "non_finite_may_become_finite" in effects
        comparison = compare(self.example.outputs, outputs, where_finite=where_finite)
        if comparison.problem:
            raise InvariantBroken(f"{what}: {comparison.problem}")
        if comparison.equal:
            return
        narrowest = narrowest_float(program)
        error = relative_error(self.example.outputs, outputs)
        if effects == ROUNDS and narrowest == torch.float64:
            good, allowed = error <= LARGEST_ERROR, f"{LARGEST_ERROR:g}"
        else:
            smallest = smallest_sqnr(effects, compared_dtypes(program))
            good, allowed = comparison.sqnr_db >= smallest, f"SQNR {smallest:g} dB, here {comparison.sqnr_db:.1f} dB"
        if good or self._is_noise(outputs, narrowest):
            return
        raise InvariantBroken(f"{what}: relative error {error:.3g}, allowed {allowed}; absolute {comparison.max_abs_error:.3g}")

    def _is_noise(self, outputs: Sequence[Tensor], dtype: torch.dtype) -> bool:
        """Each output is no further off than rounding every value once more, to `dtype`, may move it."""
        inputs = [t.clone() for t in self.example.tensors]
        times = NOISE_ALLOWED_HALF if dtype in (torch.float16, torch.bfloat16) else NOISE_ALLOWED
        largest = [0.0] * len(outputs)
        for seed in range(3):
            with seeded(), Rounding(torch.finfo(dtype).eps, seed):
                moved = self.captured.run(*(t.clone() for t in inputs))
            largest = [max(n, _distance(a, b)) for n, a, b in zip(largest, self.example.outputs, moved)]
        return all(
            _distance(expected, got) <= times * noise for expected, got, noise in zip(self.example.outputs, outputs, largest)
        )


class Rounding(TorchDispatchMode):
    """Moves every new floating value by a random relative error of up to `eps`."""

    def __init__(self, eps: float, seed: int):
        super().__init__()
        self.eps = eps
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = isinstance(result, Tensor) and result.is_floating_point() and not schema_of(func).returns[0].alias_info
        if not new or result.numel() == 0:
            return result
        error = torch.rand(result.shape, generator=self.generator, dtype=torch.float64, device="cpu")
        moved = result.double() * (1 + self.eps * (2 * error - 1))
        return torch.empty_like(result).copy_(moved)


def _distance(expected: Tensor, got: Tensor) -> float:
    if expected.numel() == 0 or expected.is_complex():
        return 0.0
    difference = (expected.double() - got.double()).abs()
    return float(difference[difference.isfinite()].max()) if bool(difference.isfinite().any()) else 0.0


def relative_error(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest |difference| over the largest |expected|, per output; the worst output counts.

    >>> relative_error([torch.tensor([1.0, -4.0])], [torch.tensor([1.0, -4.5])])
    0.125
    """
    worst = 0.0
    for e, g in zip(expected, got, strict=True):
        difference = _distance(e, g)
        scale = float(e.double().abs().max()) if e.numel() else 1.0
        error = difference / scale if scale else math.inf if difference else 0.0
        worst = max(worst, error if error == error else math.inf)  # a NaN is as wrong as can be
    return worst


def check_bitwise(pass_: Pass, expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    """Equal bit by bit, the sign of a zero included (any NaN is as good as another). Raises `InvariantBroken`."""
    comparison = compare(expected, got)
    if not comparison.equal:
        moved = comparison.problem or f"outputs moved by up to {comparison.max_abs_error:.3g}"
        raise InvariantBroken(f"{pass_} is declared exact, but {moved}")
    for e, g in zip(expected, got):
        if e.is_floating_point() and not torch.equal(e.signbit() & ~e.isnan(), g.signbit() & ~g.isnan()):
            raise InvariantBroken(f"{pass_} is declared exact, but a zero changed its sign")


# -- all of them --------------------------------------------------------------------------------------------------------


def check_invariants(
    pass_: Pass, program: Program, oracle: Oracle, effects: NumericEffects = frozenset()
) -> tuple[Program, RewriteLog]:
    """Run a pass on a Program and check all invariants; return the new Program and the rewrite log.

    `effects`: those of the passes that ran before, which the numbers may show. Raises `InvariantBroken`.

    >>> import passes
    >>> from ir_tools.frontends.capture import capture
    >>> from ir_tools.frontends.source import prepare
    >>> source = prepare(torch.nn.Dropout().eval(), [((torch.randn(2, 3),), {})])
    >>> program = capture(source, "trace").program
    >>> _, log = check_invariants(passes.CATALOGUE["remove_dropout"], program, Oracle(program, source.examples[0]))
    >>> [rewrite.rule for rewrite in log.rewrites]
    ['dropout(x) -> x']
    """
    check_docstring(pass_)
    example = oracle.example
    after, log = rewritten(pass_, program, *example.tensors)
    if after is program:
        return after, log
    check_skipping(pass_, program, log)
    outputs = run_seeded(after, example)
    if pass_.is_exact:
        check_bitwise(pass_, run_seeded(program, example), outputs)
    first = log.rewrites[0]
    what = f"{pass_} changed the numbers (its first rewrite: {first.rule} at {first.module})"
    try:
        oracle.judge(after, outputs, effects | pass_.effects, what)
    except InvariantBroken as error:
        raise InvariantBroken(str(error), f"{pass_.name} changed the numbers: {first.rule}") from None
    return after, log
