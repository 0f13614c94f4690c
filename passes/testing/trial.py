"""One model, one front end, some passes: the invariants checked, or compiled end to end; and the same as text for a test."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ir_tools.errors import PassesError, first_line
from ir_tools.frontends.capture import FRONTENDS, quiet
from ir_tools.frontends.source import prepare
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.ir import check_wellformed
from ir_tools.ir.signature import result_tensors
from ir_tools.rewrite import Pass
from ir_tools.rewrite.numeric_effects import NumericEffects
from ir_tools.torch_compat.dispatch import FILES_OF_TRACERS
from passes.driver.catalogue import CATALOGUE, find_passes
from passes.driver.compiled_model import load
from passes.driver.optimize import optimize
from passes.driver.verification import run_seeded
from passes.errors import CaptureError, EmitError, NumericsError
from passes.testing.invariants import InvariantBroken, Oracle, check_invariants
from passes.testing.model_text import RandomModel, build, make_inputs
from passes.testing.tally import Tally, kind_of
from passes.testing.true_facts import known_strides


class CaptureRefused(PassesError):
    """A front end, or torch, cannot capture a model (or TorchScript express it): no fault of a pass. Counted by kind."""


class CaptureIsWrong(InvariantBroken):
    """The captured Program does not give the model's numbers."""


# -- one run ------------------------------------------------------------------------------------------------------------


def hold(
    model: Callable[[], nn.Module],
    example_inputs: Callable[[], tuple[Tensor, ...]],
    passes: str | Pass | Iterable[str | Pass],
    *,
    before: str | Pass | Iterable[str | Pass] = (),
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    frontend: str = "trace",
    engine: str | None = None,
) -> Tally:
    """Check the invariants of passes on one model, made by `model()` and called on `example_inputs()`.

    Args:
        passes: names and `Pass` objects, run one after another, the invariants of each checked.
        before: passes that run first, unchecked.
        seed: of weights and inputs; `dtype` is torch's default dtype while they are made.
        frontend: "trace", "script", "fx" or "export".
        engine: None, or an engine of `optimize`: the model is then compiled, saved and loaded, and its numbers compared.

    Returns what the passes did. Raises `InvariantBroken`, or whatever a pass raises; `CaptureRefused` when capture fails.

    >>> done = hold(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), lambda: (torch.randn(2, 3),), "fuse_conv_bn")
    >>> dict(done.rewrites)
    {'fuse_conv_bn: batch_norm(layer(x)) -> layer(x)': 1}
    """
    made, inputs = build(model, seed, dtype), make_inputs(example_inputs, seed, dtype)
    if engine is not None:
        return compiled(made, inputs, find_passes(passes), frontend, engine)
    return held(made, inputs, find_passes(passes), find_passes(before), frontend)


def held(model: nn.Module, inputs: tuple[Tensor, ...], passes: Iterable[Pass], before: Iterable[Pass], frontend: str) -> Tally:
    """`hold` for a model that is built already, in eval mode."""
    tally = Tally(models=1)
    oracle = captured(model, inputs, frontend)
    program, effects = oracle.captured, NumericEffects()
    for pass_ in before:
        program = pass_(program)
        effects |= pass_.effects
    for pass_ in passes:
        program, log = check_invariants(pass_, program, oracle, effects)
        tally.count(pass_, log)
        if log.rewrites:
            effects |= pass_.effects
    tally.captured[f"{frontend}: captured"] += 1
    tally.untouched = int(not tally.rewrites)
    strides = known_strides(program, *oracle.example.tensors)
    tally.tensors, tally.strides_known = strides.tensors, strides.known
    return tally


def captured(model: nn.Module, inputs: tuple[Tensor, ...], frontend: str) -> Oracle:
    """Capture a model and compare the Program with it.

    Raises `CaptureRefused` when the front end or torch cannot, `CaptureIsWrong` when the numbers differ.
    """
    with torch.no_grad():
        source = prepare(model, [(inputs, {})])
    try:
        with quiet(), undisturbed(model):
            program = FRONTENDS[frontend](source)
    except Exception as error:
        if isinstance(error, CaptureError) or raised_by_capturing(error):
            raise CaptureRefused(f"{frontend}: {type(error).__name__}: {kind_of(first_line(error))}") from error
        raise
    check_wellformed(program)
    oracle = Oracle(program, source.examples[0])
    try:
        outputs = run_seeded(program, oracle.example)
        oracle.judge(program, outputs, NumericEffects(), "the captured graph differs from the model")
    except InvariantBroken as error:
        raise CaptureIsWrong(str(error)) from None
    return oracle


def raised_by_capturing(error: BaseException) -> bool:
    """The error comes out of torch's own tracer, script compiler, exporter or symbolic tracer."""
    files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((i for i, file in enumerate(files) if "/ir_tools/" in file), default=-1)
    return any(tracer in file for file in files[ours + 1 :] for tracer in FILES_OF_TRACERS)


def compiled(model: nn.Module, inputs: tuple[Tensor, ...], passes: list[Pass], frontend: str, engine: str) -> Tally:
    """`optimize` end to end, saved and loaded again, its numbers those of the eager model.

    Raises `InvariantBroken` when they are not; `CaptureRefused` when the front end or TorchScript cannot.
    """
    tally = Tally(models=1)
    oracle = captured(model, inputs, frontend)
    try:
        try:
            fast = optimize(model, passes, example_inputs=inputs, frontend=frontend, engine=engine)
        except (NumericsError, CaptureError) as error:
            if not isinstance(error, NumericsError) and not isinstance(error.__cause__, NumericsError):
                raise
            # `optimize` does not allow for models that amplify rounding; the oracle does.
            fast = optimize(model, passes, example_inputs=inputs, frontend=frontend, engine=engine, verify="off")
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "model.pt"
            fast.save(path)
            loaded = load(path)
    except (EmitError, CaptureError) as error:
        raise CaptureRefused(f"{engine}: {type(error).__name__}: {kind_of(first_line(error))}") from error
    effects = NumericEffects().union(*(step.effects for step in fast.report.steps))
    for name, call in (("the compiled model", fast), ("the file", loaded)):
        with torch.no_grad(), seeded():
            outputs = result_tensors(call(*(t.clone() for t in inputs)))
        oracle.judge(fast.program, outputs, effects, f"{name} ({', '.join(map(str, passes)) or 'no passes'}; {engine})")
    for step in fast.report.steps:
        tally.rewrites.update(f"{step.name}: {rewrite.rule}" for rewrite in step.rewrites)
        tally.refusals.update(f"{step.name}: {kind_of(refusal.reason)}" for refusal in step.refusals)
    tally.captured[f"{frontend}: captured"] += 1
    tally.captured[f"{engine}: emitted, saved, loaded"] += 1
    tally.untouched = int(not tally.rewrites)
    return tally


# -- the same as text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A random model, what is done to it, and how to write that as a test."""

    model: RandomModel
    passes: tuple[str | Pass, ...]
    frontend: str = "trace"
    engine: str | None = None
    before: tuple[str | Pass, ...] = ()

    def run(self) -> Tally:
        """Raises as `hold` does."""
        model, inputs = self.model.module(), self.model.inputs()
        if self.engine is not None:
            tally = compiled(model, inputs, find_passes(self.passes), self.frontend, self.engine)
        else:
            tally = held(model, inputs, find_passes(self.passes), find_passes(self.before), self.frontend)
        tally.phrases.update(self.model.phrases)
        return tally

    def as_test(self, why: str, imports: str = "") -> str:
        """A pytest file that fails as this trial did: it imports torch and `passes.testing` alone, and `imports`."""
        settings = [f"[{', '.join(map(_name, self.passes))}]"]
        settings += [f"before=[{', '.join(map(_name, self.before))}]"] if self.before else []
        settings += [f"seed={self.model.seed}", f"dtype={self.model.dtype}", f'frontend="{self.frontend}"']
        settings += [f'engine="{self.engine}"'] if self.engine else []
        quoted = why.replace("\\", "\\\\").replace('"""', "'''")
        body = self.model.source.removeprefix("import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n")
        return (
            f'"""{quoted}"""\n\nimport torch\nfrom torch import nn\nfrom torch.nn import functional as F\n\n'
            f"from passes.testing import hold\n{imports}{body}\n\n"
            f"def test_{self.model.name}():\n    hold(Model, example_inputs, {', '.join(settings)})\n"
        )

    @property
    def size(self) -> tuple[int, int]:
        """Shorter is simpler."""
        return len(self.model.source.splitlines()), len(self.model.source) + 10 * len(self.passes)


def _name(pass_: str | Pass) -> str:
    """How a test writes a pass: a name of the catalogue in quotes, any other as a variable."""
    if isinstance(pass_, Pass) and CATALOGUE.get(pass_.name) is not pass_:
        return pass_.name
    return f'"{pass_}"'
