"""Capture: from a prepared `Source` to a Program, through one of four front ends."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ir_tools.errors import CaptureError, first_line
from ir_tools.frontends.from_export import from_export
from ir_tools.frontends.from_fx import from_fx
from ir_tools.frontends.from_script import from_script
from ir_tools.frontends.from_trace import from_trace
from ir_tools.frontends.source import Source
from ir_tools.frontends.trace_validation import TraceValidation, validate_trace
from ir_tools.frontends.trials import tried
from ir_tools.frontends.undisturbed import undisturbed
from ir_tools.ir import Program
from ir_tools.torch_compat.symbols import SYMBOLIC_SHAPES_LOGGER

FRONTENDS = {"export": from_export, "trace": from_trace, "script": from_script, "fx": from_fx}
ORDER = tuple(FRONTENDS)
"""The order in which "auto" tries them."""


@dataclass
class Captured:
    """A Program, and how it was captured."""

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
        if source.is_dynamic and len(order) > 1:  # a trace holds what the example's sizes led to: it comes after script
            order = ("export", "script", "trace", "fx")
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
            validation = TraceValidation()
            if name == "trace":
                with quiet():
                    validation = validate_trace(program, source, heard, proof_needed=frontend == "auto")
                if frontend == "auto" and validation.refusal:
                    raise CaptureError(validation.refusal)
                warned = [w for w in heard if issubclass(w.category, torch.jit.TracerWarning)]
                if frontend == "auto" and source.is_dynamic and warned:
                    raise CaptureError(
                        f"tracing made a constant of what it saw ({str(warned[0].message).splitlines()[0]}), and sizes are "
                        "dynamic; where that is right, ask for frontend='trace'"
                    )
            with quiet():
                program, lines = tried(program, source)
        except Exception as error:  # a front end may raise anything; its reason is kept
            refusals[name] = f"{type(error).__name__}: {first_line(error)}"
            if len(order) == 1:
                prefix = f"the front end {name!r} cannot capture this model: "
                raise CaptureError(prefix + (str(error) if isinstance(error, CaptureError) else refusals[name])) from error
            continue
        reason = _reason(name, frontend, source, refusals)
        if frontend == "auto" and validation.proof:
            reason += f"; {validation.proof}"
        return Captured(program, name, reason, refusals, [*validation.lines, *lines])
    raise CaptureError(
        "no front end can capture this model:\n" + "\n".join(f"  {name}: {why}" for name, why in refusals.items())
    )


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Record warnings, and keep what torch prints about a failed export off the terminal: the error reports it."""
    logger = logging.getLogger(SYMBOLIC_SHAPES_LOGGER)
    disabled = logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings(record=True) as heard, contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("always")
            yield heard
    finally:
        logger.disabled = disabled


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
