"""Capture: from a prepared `Source` to a Program, through one of four front ends."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ir_tools.errors import first_line
from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.from_export import from_export
from ir_tools.frontends.from_fx import from_fx
from ir_tools.frontends.from_script import from_script
from ir_tools.frontends.from_trace import from_trace
from ir_tools.frontends.source import Source, answer, call_model, seeded, undisturbed
from ir_tools.ir import Program
from ir_tools.verify.numerics import compare

FRONTENDS = {"export": from_export, "trace": from_trace, "script": from_script, "fx": from_fx}
ORDER = tuple(FRONTENDS)
"""The order in which "auto" tries them."""


@dataclass
class Captured:
    """A Program, and how it was come by."""

    program: Program
    frontend: str
    reason: str
    refusals: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def capture(
    source: Source, frontend: str = "auto", accept: Callable[[Program], None] = lambda program: None
) -> Captured:
    """Capture by the front end named, or by the first of `ORDER` that can and whose Program `accept` does not reject.

    Raises `CaptureError` with every front end's reason when none can.
    """
    if frontend == "auto":
        scripted = isinstance(source.model, torch.jit.ScriptModule)
        order: tuple[str, ...] = ("script",) if scripted else ("export",) if source.exported is not None else ORDER
    elif frontend in FRONTENDS:
        order = (frontend,)
    else:
        raise CaptureError(f"there is no front end {frontend!r}; there are auto, {', '.join(FRONTENDS)}")
    refusals: dict[str, str] = {}
    for name in order:
        try:
            with quiet() as heard, undisturbed(source.model):
                program = FRONTENDS[name](source)
            accept(program)
            tracer = [str(w.message).splitlines()[0] for w in heard if issubclass(w.category, torch.jit.TracerWarning)]
            told = list(dict.fromkeys(tracer))
            reads = value_reads(source) if name == "trace" else []
            reads += ["numpy"] if any("to a NumPy array" in line for line in told) else []
            if reads:
                if frontend == "auto":
                    raise CaptureError(
                        f"forward reads tensor values in Python ({', '.join(reads)}), and a trace holds only what the example "
                        "inputs gave; where that is right, ask for frontend='trace'"
                    )
                told.append(f"forward reads tensor values in Python ({', '.join(reads)})")
                told.append(verdict_on_trace(program, source))
        except Exception as error:  # a front end may fail in any way; its reason is kept
            refusals[name] = f"{type(error).__name__}: {first_line(error)}"
            if len(order) == 1:
                prefix = f"the front end {name!r} cannot capture this model: "
                raise CaptureError(prefix + (str(error) if isinstance(error, CaptureError) else refusals[name])) from error
            continue
        reason = _reason(name, frontend, source, refusals)
        return Captured(program, name, reason, refusals, told)
    raise CaptureError(
        "no front end can capture this model:\n" + "\n".join(f"  {name}: {why}" for name, why in refusals.items())
    )


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Record warnings, and keep what torch prints about a failed export off the terminal: the error says it."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("always")
            yield heard
    finally:
        logger.disabled = disabled


class _ValueReads(TorchDispatchMode):
    """Notes the ops through which Python learns the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.names[str(func.overloadpacket.__name__)] = None
        return func(*args, **(kwargs or {}))


def value_reads(source: Source) -> list[str]:
    """Ops by which the model's `forward` reads tensor values in Python: `.item()`, `bool()`, `torch.equal`, ..."""
    arguments = pytree.tree_map_only(torch.Tensor, torch.clone, source.examples[0].arguments)
    with undisturbed(source.model), _ValueReads() as reads:
        call_model(source.model, arguments)
    return list(reads.names)


def verdict_on_trace(program: Program, source: Source) -> str:
    """Run the traced Program and the model on perturbed inputs of the same sizes, and compare.

    Floats are negated, scaled and shuffled, integers reversed: values that may take another branch than the example's.
    """
    compared = 0
    for kind, tensors in _perturbed(source.tensors):
        try:
            expected = pytree.tree_leaves(answer(source.model, source.signature.arguments(tensors)))
        except Exception:  # the model itself rejects these values: they tell nothing
            continue
        with seeded():
            got = program.run(*(t.clone() for t in tensors))
        result = compare([t for t in expected if isinstance(t, torch.Tensor)], got)
        if result.problem or result.sqnr_db < SMALLEST_SQNR_OF_A_TRACE:
            how = result.problem or f"SQNR {result.sqnr_db:.0f} dB"
            return f"the trace is wrong for other inputs: with {kind} inputs it differs from the model ({how})"
        compared += 1
    return f"the traced graph agrees with the model on {compared} sets of perturbed inputs of the same sizes"


SMALLEST_SQNR_OF_A_TRACE = 60.0
"""In dB, below which two float computations of one function are taken to be of different functions."""


def _perturbed(tensors: list[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def shuffled(t: torch.Tensor) -> torch.Tensor:
        return t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].reshape(t.shape)

    def is_signed(t: torch.Tensor) -> bool:
        return t.is_floating_point() or t.is_complex()

    yield "negated", [-t if is_signed(t) else t.flip(tuple(range(t.dim()))) for t in tensors]
    yield "shuffled", [shuffled(t) for t in tensors]
    yield "scaled", [t * 3 if is_signed(t) else t for t in tensors]


def _reason(name: str, asked: str, source: Source, refusals: dict[str, str]) -> str:
    if asked != "auto":
        return "asked for"
    if isinstance(source.model, torch.jit.ScriptModule):
        return "the model is TorchScript"
    if source.exported is not None:
        return "the model is an ExportedProgram"
    if not refusals:
        return "first of the order export, trace, script, fx"
    return f"after {', '.join(refusals)} refused"
