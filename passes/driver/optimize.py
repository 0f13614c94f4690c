"""`optimize`: capture, passes, verification, lowering, emission."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ir_tools.frontends.capture import Captured, capture
from ir_tools.frontends.source import Source, prepare
from ir_tools.frontends.undisturbed import one_at_a_time
from ir_tools.ir import Program
from ir_tools.ir.dialect import op_name
from ir_tools.rewrite import Pass
from ir_tools.rewrite.nearest import locations_of
from ir_tools.verify.numerics import SMALLEST_GOLDEN_SQNR_DB
from passes.driver.compilation import CompilationContext, count_ops
from passes.driver.compiled_model import OptimizedModel
from passes.driver.inputs import (
    calibration_items,
    calibration_tensors,
    check_mode,
    check_options,
    dump_directory,
    example_calls,
    open_model,
    refuse_autocast,
    under_either_name,
)
from passes.driver.instrumentation import Drawings, announced, needs_ranges
from passes.driver.manifest import build_manifest
from passes.driver.on_slower import Forking, faster
from passes.driver.pipeline import DEFAULT, plan, with_lowering
from passes.driver.verification import Numerics, narrowest_float
from passes.errors import CaptureError, SlowerWarning
from passes.lower.target import Target
from passes.lower.targets import registered_targets
from passes.report.report import Report
from passes.tune.tuning_record import TuningRecords


def optimize(
    model: Any,
    passes: str | Pass | Iterable[str | Pass] = DEFAULT,
    *,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    frontend: str = "auto",
    dynamic_shapes: Any = None,
    engine: str | Target = "auto",
    calibration_data: Any = None,
    tolerance: float | None = None,
    verify: str = "each",
    on_failure: str = "raise",
    dump_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    dry_run: bool = False,
    tuning_records: str | os.PathLike[str] | None = None,
    explain_at: str | None = None,
    choices: str | os.PathLike[str] | None = None,
) -> Any:
    """Compile a model for inference: capture it, apply `passes`, verify the numbers, emit TorchScript.

    Args:
        model: an `nn.Module` in eval mode, a `ScriptModule`, an `fx.GraphModule`, an `ExportedProgram`, or the path of a
            TorchScript `.pt` file. It is left exactly as it was. Do not run it elsewhere during the call, which may change
            its state and restores it; calls of `optimize` in several threads wait for each other.
        passes: names, groups and `Pass` objects, in order; options as in `"cast_half:dtype=float16"`. The default
            changes no precision.
        example_inputs: a tensor, a tuple of arguments, or a list of such tuples (all are verified; the first one is
            captured, and its sizes are baked in).
        example_kwargs: keyword arguments that go with them.
        frontend: "auto" (export, trace, script, fx, in this order), or one of these.
        engine: "auto", "aten" (files that move between devices), "onednn_ops" (packed oneDNN kernels, CPU only), the name of
            a target that was registered, or a `Target`.
        calibration_data: calls on which passes that lower precision observe how large values get: an iterable, read once,
            whose items are each a tensor, a tuple or list of arguments, or a dict of keyword arguments (a DataLoader gives
            such). `example_kwargs` go with each, where it does not have its own. A dict is one argument where
            `example_inputs` has a dict as the first argument. None: they observe the example inputs.
        tolerance: the smallest SQNR allowed, in dB; None takes it from a table by pass and dtype.
        verify: "each" pass, only the "ends", or "off".
        on_failure: "raise", the only one that is built.
        dump_dir: a directory for numbered drawings of the graph after each step.
        progress: called with a line at the start of each step.
        dry_run: capture and run the passes, emit nothing, and return the `Report` alone.
        tuning_records: a file that `report.tuning_records.save(path)` wrote. Which kernel variants are fastest is taken from
            it, and measured only for workloads that it lacks. The same file gives the same graph.
        explain_at: a module path, or the name of an op: the report then says how near each rule of each pass came there
            ("matched conv2d, but its user is mul, not batch_norm").
        choices: the old name of `tuning_records`, for one more release.

    Where a pass with the option `on_slower` (`cast_half`) changed something, the model is also lowered and emitted without that
    pass, both are timed in turn for about two seconds at most (one round each of models that are slow), and `report.speed` has
    the result. Where the pass makes the model slower here, `on_slower` decides: "warn" raises a `SlowerWarning`, "keep" does
    not, "revert" gives the model without the pass. That costs a second emission and, while it lasts, a second set of weights.
    Of several such passes the first that changed something is compared; the others stay in both models.

    Returns:
        An `OptimizedModel` (called like `model`), or a `Report` when `dry_run`.

    Raises:
        PassesError: one of its subclasses, with what was given, what was expected, and what to do.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> x = torch.randn(1, 3, 16, 16)
    >>> fast = optimize(model, example_inputs=x)
    >>> torch.allclose(fast(x), model(x), atol=1e-5)
    True
    """
    start = time.perf_counter()
    progress = progress or (lambda line: None)
    refuse_autocast()
    pipeline = plan(passes, engine)
    check_options(frontend, verify, on_failure, tolerance)
    tuning_records = under_either_name("tuning_records", tuning_records, "choices", choices)
    if tuning_records is not None:
        TuningRecords.load(tuning_records)  # a bad file is an error before any work is done
    module = open_model(model)
    check_mode(module)
    calls = example_calls(example_inputs, example_kwargs)
    calibration = None if calibration_data is None else calibration_items(calibration_data, calls)
    drawings = Drawings(dump_directory(dump_dir))

    progress("running the model on the example inputs")
    source = prepare(module, calls, dynamic_shapes)
    if calibration is not None:
        calibration_tensors(calibration, source.signature)  # an error now, and not after a long capture
    numerics = Numerics(source.examples, tolerance)

    progress("capturing")
    clock = time.perf_counter()
    with one_at_a_time:  # capturing also sets warning filters, which are the whole process's
        captured = capture(source, frontend, (lambda program: None) if verify == "off" else numerics.check_capture)
    program = captured.program
    given = [engine] if isinstance(engine, Target) else []
    _refuse_lowered(program, [*registered_targets(), *given, *(p.target for p in pipeline if p.target is not None)])
    seconds = time.perf_counter() - clock
    report = _report_of(source, captured, seconds, numerics, verified=verify != "off", dry_run=dry_run)
    observe_on = None if calibration is None else calibration_tensors(calibration, program.signature)
    pipeline, target = with_lowering(pipeline, engine, source)
    report.engine = target.name
    report.notes += _not_used(pipeline, program, tuning_records, observe_on, explain_at)
    context = CompilationContext(source, target, verify, explain_at, observe_on, tuning_records)
    forking = Forking(numerics)
    drawings.draw(program, 0, "captured", None)
    result = context.run_passes(program, pipeline, numerics, [announced(progress), drawings.hook, forking.hook])
    if not dry_run:
        progress("emitting TorchScript")
        clock = time.perf_counter()
        result = context.emitted(result)
        report.emit_seconds = time.perf_counter() - clock
    if not dry_run and forking.fork is not None:
        report.speed, result = faster(context, result, forking.fork, pipeline, progress)
        if report.speed.decision == "reverted":
            drawings.draw(result.program, len(pipeline) + 1, f"without_{report.speed.pass_name}", forking.fork.program)
    report.notes += drawings.notes
    result.report_to(report)
    report.seconds = time.perf_counter() - start
    if dry_run:
        return report
    if report.speed is not None and report.speed.decision == "warned":
        warnings.warn(report.speed.advice, SlowerWarning, stacklevel=2)
    manifest = build_manifest(result.program, report, SMALLEST_GOLDEN_SQNR_DB[narrowest_float(result.program)], target.needs)
    independent = _independent(result.program, program)
    return OptimizedModel(result.scripted, independent, report, drawings.files, manifest, (context.arguments[0], result.golden))


def _report_of(
    source: Source, captured: Captured, seconds: float, numerics: Numerics, *, verified: bool, dry_run: bool
) -> Report:
    """The report of the run, as far as it is known after capture."""
    compared = numerics.captured
    return Report(
        frontend=captured.frontend,
        frontend_reason=captured.reason,
        frontend_refusals=captured.refusals,
        inputs=[str(i) for i in source.signature.inputs],
        capture_seconds=seconds,
        captured_nodes=len(captured.program),
        captured_ops=count_ops(captured.program),
        captured_sqnr_db=compared.sqnr_db if compared is not None else None,
        captured_max_abs_error=compared.max_abs_error if compared is not None else None,
        verified=verified,
        dry_run=dry_run,
        notes=list(captured.warnings),
    )


def _refuse_lowered(program: Program, targets: Sequence[Target]) -> None:
    """A file that was lowered to another target's ops can be drawn and run, but no pass can rewrite its graph."""
    namespaces = {name for target in targets for name in target.namespaces}
    lowered = [node for node in program.all_calls if op_name(node.target).partition("::")[0] in namespaces]
    if lowered:
        raise CaptureError(f"the model holds {op_name(lowered[0].target)}: it was optimised already; pass the original model")


def _not_used(
    pipeline: Sequence[Pass], captured: Program, tuning_records: Any, observe_on: Any, explain_at: str | None
) -> list[str]:
    """A line for each argument of `optimize` that no pass of the pipeline uses."""
    notes = []
    if tuning_records is not None and not any(TuningRecords in p.needs for p in pipeline):
        given = f"tuning_records={os.fspath(tuning_records)!r}"
        notes.append(f"{given} was not used: the lowering of this engine has no kernel variants")
    if observe_on is not None and not any(map(needs_ranges, pipeline)):
        notes.append("calibration_data was not used: no pass of the pipeline needs ranges")
    if explain_at is not None and not any(explain_at in locations_of(node) for node in captured.all_calls):
        notes.append(f"explain_at={explain_at!r}: no op of the captured graph comes from there")
    return notes


def _independent(program: Program, captured: Program) -> Program:
    """The Program with copies of the constants that it still has from capture: those are the user's own memory."""
    theirs = {t.untyped_storage().data_ptr() for t in captured.constants.values()}
    for name, tensor in program.constants.items():
        if tensor.untyped_storage().data_ptr() in theirs:
            program.constants[name] = tensor.clone()
    return program
