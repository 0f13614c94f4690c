"""`optimize`: capture, passes, verification, lowering, emission."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ir_tools.emit import package
from ir_tools.emit.calling import arguments_for
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import first_line
from ir_tools.frontends.capture import FRONTENDS, capture
from ir_tools.frontends.portability import follow_inputs
from ir_tools.frontends.source import Source, prepare
from ir_tools.frontends.undisturbed import one_at_a_time
from ir_tools.ir import Program, Signature, check_wellformed
from ir_tools.ir.dialect import op_name, short_name
from ir_tools.rewrite import Pass
from ir_tools.rewrite.nearest import places_of
from ir_tools.verify.numerics import SMALLEST_GOLDEN_SQNR_DB
from passes.catalogue import CATALOGUE, find_passes
from passes.choices import Choices
from passes.errors import CaptureError, InputError, ModelInTrainingError, OptionError, SignatureError
from passes.hooks import (
    Fork,
    Hook,
    Numerics,
    announced,
    asks_for_ranges,
    chosen,
    dump,
    dumped,
    explained,
    float_dtypes,
    forked,
    narrowest_float,
    observed,
    timed,
    wellformed,
)
from passes.optimized import OptimizedModel, build_manifest, call_flat
from passes.pipeline import DEFAULT, LOWERINGS, check_order, run_pipeline
from passes.report import Report, StepReport
from passes.speed import Contestant, SlowerWarning, Speed, asks_for_verdict, decide

ENGINES = ("auto", "aten", "onednn_ops")
VERIFY = ("each", "ends", "off")


def optimize(
    model: Any,
    passes: str | Pass | Iterable[str | Pass] = DEFAULT,
    *,
    example_inputs: Any = None,
    example_kwargs: dict[str, Any] | None = None,
    frontend: str = "auto",
    dynamic_shapes: Any = None,
    engine: str = "auto",
    calibration_data: Any = None,
    tolerance: float | None = None,
    verify: str = "each",
    on_failure: str = "raise",
    dump_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
    dry_run: bool = False,
    choices: str | os.PathLike[str] | None = None,
    explain_at: str | None = None,
) -> Any:
    """Compile a model for inference: capture it, apply `passes`, prove the numbers, emit TorchScript.

    Args:
        model: an `nn.Module` in eval mode, a `ScriptModule`, an `fx.GraphModule`, an `ExportedProgram`, or the path of a
            TorchScript `.pt` file. It is left exactly as it was. Nobody else may run it during the call, which may move
            its state and puts it back; calls of `optimize` in several threads wait for each other.
        passes: names, groups and `Pass` objects, in order; options as in `"cast_half:dtype=float16"`. The default
            changes no precision.
        example_inputs: a tensor, a tuple of arguments, or a list of such tuples (all are verified; the first one is
            captured, and its sizes are baked in).
        example_kwargs: keyword arguments that go with them.
        frontend: "auto" (export, trace, script, fx, in this order), or one of these.
        engine: "auto", "aten" (files that move between devices) or "onednn_ops" (packed oneDNN kernels, CPU only).
        calibration_data: calls on which passes that lower precision observe how large values get: an iterable, read once,
            whose items are each a tensor, a tuple or list of arguments, or a dict of keyword arguments (a DataLoader gives
            such). `example_kwargs` go with each, where it does not have its own. A dict is one argument where
            `example_inputs` has a dict in first place. None: they observe the example inputs.
        tolerance: the smallest SQNR allowed, in dB; None takes it from a table by pass and dtype.
        verify: "each" pass, only the "ends", or "off".
        dump_dir: a directory for numbered drawings of the graph after each step.
        progress: called with a line at the start of each step.
        dry_run: capture and run the passes, emit nothing, and return the `Report` alone.
        choices: a file that `report.choices.save(path)` wrote. Which ops oneDNN's kernels fuse is taken from it, and
            measured only where it has no answer. The same file gives the same graph.
        explain_at: a module path, or the name of an op: the report then says how near each rule of each pass came there
            ("matched conv2d, but its reader is mul, not batch_norm").

    Where a pass with the option `on_slower` (`cast_half`) changed something, the model is also lowered and emitted without that
    pass, both are timed in turn for about two seconds at most (one round each of models that are slow), and `report.speed` has
    the verdict. Where the pass makes the model slower here, `on_slower` decides: "warn" raises a `SlowerWarning`, "keep" does
    not, "revert" gives the model without the pass. That costs a second emission and, while it lasts, a second set of weights.
    Of several such passes the first that changed something is judged; the others stay in both models.

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
    tell = progress or (lambda line: None)
    _refuse_autocast()
    pipeline = plan(passes, engine)
    _check_options(frontend, verify, on_failure, tolerance)
    if choices is not None:
        Choices.load(choices)  # a bad file is an error before any work is done
    module = _open_model(model)
    _check_mode(module)
    calls = _example_calls(example_inputs, example_kwargs)
    calibration = None if calibration_data is None else _calibration_items(calibration_data, calls)
    directory = _dump_directory(dump_dir)

    tell("running the model on the example inputs")
    source = prepare(module, calls, dynamic_shapes)
    if calibration is not None:
        _calibration_tensors(calibration, source.signature)  # an error now, and not after a long capture
    numerics = Numerics(source.examples, tolerance)
    report = Report(inputs=[str(i) for i in source.signature.inputs], verified=verify != "off", dry_run=dry_run)

    tell("capturing")
    clock = time.perf_counter()
    with one_at_a_time:  # capturing also sets warning filters, which are the whole process's
        captured = capture(source, frontend, (lambda program: None) if verify == "off" else numerics.check_capture)
    program = captured.program
    _refuse_lowered(program)
    observe_on = None if calibration is None else _calibration_tensors(calibration, program.signature)
    report.capture_seconds = time.perf_counter() - clock
    report.frontend, report.frontend_reason = captured.frontend, captured.reason
    report.frontend_refusals, report.captured_nodes = captured.refusals, len(program)
    report.captured_ops = _count_ops(program)
    report.notes += captured.warnings
    if numerics.captured is not None:
        report.captured_sqnr_db = numerics.captured.sqnr_db
        report.captured_max_abs_error = numerics.captured.max_abs_error

    dumps: list[Path] = []
    pipeline = [*pipeline, *([] if _lowering(pipeline) else [CATALOGUE[_lowering_for(engine, source)]])]
    if choices is not None and not any("choices" in p.options for p in pipeline):
        report.notes.append(f"choices={os.fspath(choices)!r} was not used: only lower_onednn chooses by measurement")
    elif choices is not None:
        pipeline = [p.with_options(choices=os.fspath(choices)) if "choices" in p.options else p for p in pipeline]
    if observe_on is not None and not any(map(asks_for_ranges, pipeline)):
        report.notes.append("calibration_data was not used: only passes that lower precision observe ranges")
    if explain_at is not None and not any(explain_at in places_of(node) for node in captured.program.all_calls):
        report.notes.append(f"explain_at={explain_at!r}: no op of the captured graph comes from there")
    report.engine = LOWERINGS[_lowering(pipeline)]
    course = _Course(source, report.engine, verify, explain_at, observe_on)
    forks: list[Fork] = []
    outer = [announced(progress), dumped(directory, dumps, report.notes), forked(forks, numerics)]
    if directory is not None:
        dump(program, directory, 0, "captured", None, dumps, report.notes)
    way = course.take(program, pipeline, numerics, outer)
    if dry_run:
        way.tell(report)
        report.seconds = time.perf_counter() - start
        return report

    tell("emitting TorchScript")
    clock = time.perf_counter()
    course.emit(way)
    report.emit_seconds = time.perf_counter() - clock
    if forks:
        report.speed, way = _faster(course, way, forks[0], pipeline, tell)
        if report.speed.decision == "reverted" and directory is not None:
            last = f"without_{report.speed.pass_name}"
            dump(way.program, directory, len(pipeline) + 1, last, forks[0].program, dumps, report.notes)
    way.tell(report)
    report.seconds = time.perf_counter() - start
    if report.speed is not None and report.speed.decision == "warned":
        warnings.warn(report.speed.advice, SlowerWarning, stacklevel=2)
    manifest = build_manifest(way.program, report, SMALLEST_GOLDEN_SQNR_DB[narrowest_float(way.program)])
    independent = _independent(way.program, captured.program)
    return OptimizedModel(way.scripted, independent, report, dumps, manifest, (course.arguments[0], way.golden))


@dataclass
class _Way:
    """One way through the passes: the Program they left, its steps, and what was emitted from it.

    `told` holds what this way has to say in the report: choices, notes, ops left, SQNR.
    """

    program: Program
    numerics: Numerics
    steps: list[StepReport]
    told: Report = field(default_factory=Report)
    scripted: Any = None
    golden: list[torch.Tensor] = field(default_factory=list)

    def tell(self, report: Report) -> None:
        """Put it into the report of the whole run."""
        report.steps, report.choices, report.ops_left = self.steps, self.told.choices, self.told.ops_left
        report.sqnr_db, report.max_abs_error = self.told.sqnr_db, self.told.max_abs_error
        report.notes += self.told.notes


@dataclass(frozen=True)
class _Course:
    """What all ways through the passes have in common."""

    source: Source
    engine: str
    verify: str
    explain_at: str | None
    observe_on: Sequence[Sequence[torch.Tensor]] | None

    @property
    def arguments(self) -> list[list[Any]]:
        """Those of the emitted module, per example."""
        return [arguments_for(self.source.signature, example.tensors) for example in self.source.examples]

    def take(self, program: Program, pipeline: Sequence[Pass], numerics: Numerics, outer: Sequence[Hook]) -> _Way:
        """Run the passes under the hooks `outer` and the usual ones."""
        told = Report()
        hooks = [*outer, explained(self.explain_at), observed(self.source.examples, self.observe_on)]
        hooks += [numerics.hook] if self.verify == "each" else []
        program, steps = run_pipeline(program, pipeline, [*hooks, wellformed, chosen(told), timed])
        if self.engine == "aten":  # the one whose files move between devices; last, so that nothing is kept from folding
            program, stays = follow_inputs(program, self.source)
            check_wellformed(program)
            told.notes += stays
        told.ops_left = _count_ops(program)
        numerics.declare(pipeline)
        return _Way(program, numerics, steps, told)

    def emit(self, way: _Way) -> None:
        """Emit the Program, and verify what came out."""
        scripted = package.round_trip(emit(way.program))
        arguments = self.arguments
        with torch.no_grad():
            if self.verify != "off":
                comparison = way.numerics.check_emitted(way.program, lambda i: call_flat(scripted, arguments[i]))
                way.told.sqnr_db, way.told.max_abs_error = comparison.sqnr_db, comparison.max_abs_error
            way.golden = call_flat(scripted, arguments[0])
        way.scripted = scripted


def _faster(
    course: _Course, way: _Way, fork: Fork, pipeline: Sequence[Pass], tell: Callable[[str], None]
) -> tuple[Speed, _Way]:
    """The verdict on the pass at which the pipeline forked, and the way to give: `way`, or the one without that pass.

    Only that pass is left out. Later ones that ask for a verdict too are in both ways, and are not judged.
    """
    clock = time.perf_counter()
    pass_ = fork.step.pass_
    dtype, reference = _speed_names(pass_, fork.program)
    aside = announced(lambda line: tell(f"without {pass_.name}: {line}"))
    at = fork.step.index
    first, rest = [p for p in pipeline[:at] if not asks_for_verdict(p)], pipeline[at:]  # any before that asks changed nothing
    fork.numerics.declare(first)  # with verify="ends" nothing was declared on the way
    try:
        other = course.take(fork.program, rest, fork.numerics, [aside])
        tell(f"emitting TorchScript without {pass_.name}")
        course.emit(other)
        dtype, reference = _speed_names(pass_, other.program)
        tell(f"timing the model without {pass_.name} and with it in turn")
        without, with_pass = (Contestant(w.program, w.scripted, course.arguments[0]) for w in (other, way))
        speed = decide(pass_, dtype, reference, without, with_pass)
    except Exception as error:  # the model is there and verified; only what it would be compared with is not
        speed = Speed(pass_.name, dtype, reference, "unknown", reason=f"{type(error).__name__}: {first_line(error)}")
    speed = replace(speed, seconds=time.perf_counter() - clock)
    if speed.decision != "reverted":
        way.told.notes += _not_judged(rest, way.steps[at:])
        return speed, way
    other.told.notes += _not_judged(rest, other.steps)
    fork.step.report.reverted = str(speed)
    other.steps = [*way.steps[: fork.step.index], *other.steps]
    return speed, other


def _not_judged(passes: Sequence[Pass], steps: Sequence[StepReport]) -> list[str]:
    """A line for each pass behind the one that was judged which asks for a verdict too."""
    asked = [p for p, step in zip(passes, steps, strict=True) if asks_for_verdict(p) and step.rewrote]
    return [f"{p}: its speed was not judged and its on_slower not read; only the first pass of these is judged" for p in asked]


def _speed_names(pass_: Pass, reference: Program) -> tuple[str, str]:
    """What `Speed` calls the dtype that the pass brings, and that of the model without it; "" for what has no such name."""
    if "dtype" not in pass_.options:
        return "", ""
    dtype = pass_.given.get("dtype", pass_.options["dtype"])
    return str(dtype).removeprefix("torch."), "float32" if float_dtypes(reference) == {torch.float32} else ""


def plan(passes: str | Pass | Iterable[str | Pass], engine: str) -> list[Pass]:
    """The passes that will run, checked for order, with dead-code removal before any lowering."""
    if engine not in ENGINES:
        raise OptionError(f"engine must be one of {', '.join(map(repr, ENGINES))}, got {engine!r}")
    found = find_passes(passes)
    check_order(found)
    lowering = _lowering(found)
    if lowering and engine not in ("auto", LOWERINGS[lowering]):
        raise OptionError(f"the pass {lowering} stands for engine={LOWERINGS[lowering]!r}, but engine={engine!r} was given")
    if CATALOGUE["remove_dead_code"] not in found:
        at = [p.name for p in found].index(lowering) if lowering else len(found)
        found.insert(at, CATALOGUE["remove_dead_code"])
    return found


def _lowering(passes: Sequence[Pass]) -> str:
    return next((p.name for p in passes if p.name in LOWERINGS), "")


def _lowering_for(engine: str, source: Source) -> str:
    """The lowering pass of an engine; "auto" is oneDNN where it is built in and the inputs are on the CPU."""
    on_cpu = all(t.device.type == "cpu" for t in source.tensors)
    if engine == "auto":
        engine = "onednn_ops" if torch.backends.mkldnn.is_available() and on_cpu else "aten"
    if engine == "onednn_ops" and not torch.backends.mkldnn.is_available():
        raise OptionError("engine='onednn_ops' needs a torch built with oneDNN, which this one is not; use engine='aten'")
    return next(name for name, stands_for in LOWERINGS.items() if stands_for == engine)


def _check_options(frontend: str, verify: str, on_failure: str, tolerance: float | None) -> None:
    if frontend not in ("auto", *FRONTENDS):
        raise OptionError(f"frontend must be one of 'auto', {', '.join(map(repr, FRONTENDS))}, got {frontend!r}")
    if verify not in VERIFY:
        raise OptionError(f"verify must be one of {', '.join(map(repr, VERIFY))}, got {verify!r}")
    if on_failure != "raise":
        raise OptionError(f"on_failure must be 'raise' (rolling back is not built yet), got {on_failure!r}")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool) and abs(tolerance) < math.inf
    if tolerance is not None and not number:
        raise OptionError(f"tolerance is the smallest SQNR allowed, a finite number of dB, got {tolerance!r}")


def _refuse_autocast() -> None:
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise InputError(
                f"torch.autocast is enabled for {device}, and would change dtypes while the model is captured: "
                "call optimize outside of it, and ask for the pass cast_half to compute in a half dtype"
            )


def _open_model(model: Any) -> Any:
    if isinstance(model, (str, os.PathLike)):
        return package.read_torchscript(model)[0]
    if isinstance(model, (nn.Module, torch.export.ExportedProgram)):
        return model
    raise InputError(
        f"model must be an nn.Module, ScriptModule, GraphModule, ExportedProgram or the path of a TorchScript file, "
        f"got {type(model).__name__}"
    )


def _check_mode(model: Any) -> None:
    if isinstance(model, torch.export.ExportedProgram):
        return
    training = [name or "the model itself" for name, module in model.named_modules() if getattr(module, "training", False)]
    if training:
        more = f" and {len(training) - 5} more" if len(training) > 5 else ""
        raise ModelInTrainingError(
            f"the model is in training mode ({', '.join(training[:5])}{more}); call model.eval() before optimize"
        )


def _count_ops(program: Program) -> dict[str, int]:
    """How often each op occurs, by name; in branches and loops too."""
    return dict(Counter(short_name(node.target) for node in program.all_calls))


def _refuse_lowered(program: Program) -> None:
    """A file that was lowered to oneDNN can be drawn and run, but its graph is past rewriting."""
    lowered = [node for node in program.all_calls if op_name(node.target).startswith("mkldnn::")]
    if lowered:
        raise CaptureError(
            f"the model holds {op_name(lowered[0].target)}: it was optimised already; give the model it was made from"
        )


_Call: TypeAlias = tuple[tuple, dict[str, Any]]


def _example_calls(example_inputs: Any, example_kwargs: dict[str, Any] | None) -> list[_Call]:
    if example_inputs is None and not example_kwargs:
        raise InputError(
            "example_inputs are missing: sizes and dtypes are taken from them, and the numbers are verified on them. "
            "Give a tensor, a tuple of arguments, or a list of such tuples"
        )
    kwargs = dict(example_kwargs or {})
    if isinstance(example_inputs, list):
        if not example_inputs:
            raise InputError("example_inputs is an empty list; give at least one tuple of arguments")
        return [(_arguments(item), kwargs) for item in example_inputs]
    return [(() if example_inputs is None else _arguments(example_inputs), kwargs)]


EXAMPLES_EXPECTED = "example_inputs must be a tensor, a tuple of arguments or a list of such tuples"


def _arguments(item: Any, expected: str = EXAMPLES_EXPECTED) -> tuple:
    if isinstance(item, tuple):
        return item
    if isinstance(item, (torch.Tensor, dict)):
        return (item,)
    raise InputError(f"{expected}, got {type(item).__name__}")


def _calibration_items(calibration_data: Any, examples: Sequence[_Call]) -> list[_Call]:
    """The arguments of each call, read once. A tensor, tuple, dict or text would be iterated too, and is no list of calls.

    A dict holds keyword arguments, unless it stands for one that the examples give by position: their first argument is a
    dict then. Those of the examples go with each call, and what the call has itself goes first.
    """
    if not isinstance(calibration_data, Iterable) or isinstance(calibration_data, (torch.Tensor, tuple, Mapping, str, bytes)):
        raise InputError(
            "calibration_data must be a list, or another iterable, of calls (tensors, tuples or lists of arguments, dicts of "
            f"keyword arguments), got {type(calibration_data).__name__}"
        )
    by_position = any(arguments and isinstance(arguments[0], Mapping) for arguments, _ in examples)
    kwargs = examples[0][1]
    items: list[_Call] = []
    for i, item in enumerate(calibration_data):
        if isinstance(item, Mapping) and not by_position:
            items.append(((), {**kwargs, **{str(name): value for name, value in item.items()}}))
        else:
            expected = f"calibration_data[{i}] must be a tensor, a tuple or list of arguments, or a dict of keyword arguments"
            items.append((tuple(item) if isinstance(item, list) else _arguments(item, expected), kwargs))
    if not items:
        raise InputError("calibration_data is empty; give at least one call, or leave it out to use the example inputs")
    return items


def _calibration_tensors(items: Sequence[_Call], signature: Signature) -> list[list[torch.Tensor]]:
    """The flat tensors of each call. Raises `InputError` for one that does not fit what the example inputs fixed."""
    calls = []
    for i, (arguments, kwargs) in enumerate(items):
        try:
            tensors = signature.flatten(arguments, kwargs)
            signature.check(tensors)
        except SignatureError as error:
            raise InputError(f"calibration_data[{i}] does not fit the example inputs: {error}") from None
        calls.append([t.detach() for t in tensors])
    return calls


def _dump_directory(dump_dir: str | os.PathLike[str] | None) -> Path | None:
    """The directory, made and known to be writable before any work is done."""
    if dump_dir is None:
        return None
    directory = Path(dump_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise OptionError(f"dump_dir {str(directory)!r} cannot be written: {error.strerror or error}") from error
    return directory


def _independent(program: Program, captured: Program) -> Program:
    """The Program with copies of the constants that it still has from capture: those are the user's own memory."""
    theirs = {t.untyped_storage().data_ptr() for t in captured.constants.values()}
    for name, tensor in program.constants.items():
        if tensor.untyped_storage().data_ptr() in theirs:
            program.constants[name] = tensor.clone()
    return program
