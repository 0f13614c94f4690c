"""The verdict on a trace: does it hold for other inputs than the example, and did each tracer warning matter?

    value read at a warned line          output of the trace          verdict on the warning
    none: it comes from sizes            -                            cannot matter: sizes are baked in
    cannot be seen: only tracing         as the model's               did not matter on N perturbed inputs
        goes there                       another for some input       may have mattered
    proven not to depend on the inputs   -                            cannot matter
    the same for every input tried       as the model's               did not matter on N perturbed inputs
    another for some input               as the model's               did not matter on N, though the value differs
    another for some input               another for that input       mattered: with such inputs the trace differs

The model is run eagerly on each perturbed input while `recorded_reads` looks on; the traced Program runs on the same.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from ir_tools.errors import first_line
from ir_tools.frontends.shadow import (
    Frame,
    Shadow,
    ShadowError,
    ShadowFunctions,
    ShadowMode,
    clothe,
    frames,
    given,
    spelled,
    users_frame,
    written,
)
from ir_tools.frontends.source import Source, call_model, seeded, undisturbed
from ir_tools.ir import Program
from ir_tools.ir.dialect import op_name
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode
from ir_tools.torch_compat.operators import OpOverload
from ir_tools.torch_compat.tensors import storage_id
from ir_tools.verify.numerics import compare

aten = torch.ops.aten

SMALLEST_SQNR_OF_A_TRACE = 60.0
"""In dB, below which two float computations of one function are taken to be of different functions."""


# -- what Python learns of values ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """One time that Python learned values of a tensor: by which op, at which lines, and (as text) what it learned.

    `innermost` is the line that torch would warn about, `user` the innermost line that is not torch's own.
    """

    how: str
    innermost: Frame
    user: Frame
    value: str = ""

    @classmethod
    def here(cls, how: str, value: Any = None) -> Read:
        stack = list(frames())
        return cls(how, stack[0], users_frame(stack), _as_text(value))

    def __str__(self) -> str:
        return f"{self.how} at {spelled(self.user)}"


def _as_text(value: Any) -> str:
    """Equal for equal values (NaN included), and small."""
    text = repr(value)
    return text if len(text) < 200 else hashlib.sha256(text.encode()).hexdigest()


SCALAR_READS = {aten._local_scalar_dense.default: "item", aten.equal.default: "equal"}
"""Dispatched ops that give Python a value. `item` stands for bool(), int(), float() and for what C++ asks on the way, too."""

MEMORY_READS = {
    torch.Tensor.numpy: "numpy",
    torch.Tensor.__array__: "numpy",
    torch.Tensor.tolist: "tolist",
    torch.Tensor.__dlpack__: "dlpack",
}
"""Methods that read memory, past dispatch."""


class _ScalarReads(TorchDispatchMode):
    def __init__(self, reads: list[Read]):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in SCALAR_READS:
            self.reads.append(Read.here(SCALAR_READS[func], result))
        return result


class _MemoryReads(TorchFunctionMode):
    def __init__(self, reads: list[Read]):
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in MEMORY_READS:
            # As a list, because `repr` of a large tensor leaves most values out.
            self.reads.append(Read.here(MEMORY_READS[func], args[0].tolist()))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded_reads() -> Iterator[list[Read]]:
    """The list that fills with what Python reads out of tensors inside the block."""
    reads: list[Read] = []
    with _ScalarReads(reads), _MemoryReads(reads):
        yield reads


@contextmanager
def lines_run(wanted: Collection[Frame]) -> Iterator[set[Frame]]:
    """The set that fills with those lines of `wanted` that Python executes inside the block."""
    ran: set[Frame] = set()
    files = {file for file, _ in wanted}

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        at = (frame.f_code.co_filename, frame.f_lineno)
        if at in wanted:
            ran.add(at)
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename in files else None

    before = sys.gettrace()
    if files:
        sys.settrace(on_call)
    try:
        yield ran
    finally:
        sys.settrace(before)


@dataclass
class EagerRun:
    """One run of the user's model: the tensors that it gave, and what Python read on the way."""

    outputs: list[torch.Tensor]
    reads: list[Read]


def run_eagerly(source: Source, tensors: Sequence[torch.Tensor]) -> EagerRun:
    """Run the model on flat input tensors (copies of them), leaving it as found. Raises what the model raises."""
    arguments = source.signature.arguments([t.clone() for t in tensors])
    with undisturbed(source.model), seeded(), recorded_reads() as reads:
        result = call_model(source.model, arguments)
        outputs = [t.detach().clone() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    return EagerRun(outputs, reads)


# -- perturbed inputs ---------------------------------------------------------------------------------------------------


def perturbed(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(what was done, inputs) of the same sizes and dtypes, each different from the example and from those before.

    Integers stay between the smallest and the largest of the example and zero, so that indices stay in range. (Inputs of
    other sizes: `trials`.)
    """
    seen = [list(tensors)]
    for kind, change in PERTURBATIONS.items():
        generator = torch.Generator().manual_seed(0)
        try:
            changed = [change(t, generator) if t.numel() else t for t in tensors]
        except RuntimeError:  # a dtype without arithmetic
            continue
        if not any(all(map(_same_values, changed, other)) for other in seen):
            seen.append(changed)
            yield kind, changed


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _is_signed(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _negated(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if t.dtype is torch.bool:
        return ~t
    return -t if _is_signed(t) else t.min().clamp(max=0) + t.max() - t


def _shuffled(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].reshape(t.shape)


def _zero(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    zeros = torch.zeros_like(t)
    return zeros if _is_signed(t) or t.dtype is torch.bool else zeros.clamp(max=t.max())


def _positive(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if t.dtype is torch.bool:
        return torch.ones_like(t)
    return t.abs().to(t.dtype) + 0.5 if _is_signed(t) else t.max().expand_as(t).clone()


def _large(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return t * 100 if _is_signed(t) else t


PERTURBATIONS = {"negated": _negated, "shuffled": _shuffled, "zero": _zero, "positive": _positive, "large": _large}


# -- the proof that reads do not depend on the inputs ---------------------------------------------------------------------


@dataclass(frozen=True)
class Dependence:
    """What a run on shadows says of the reads in it: which depend on the inputs. `unknown`: why nothing can be said."""

    dependent: tuple[Read, ...] = ()
    unknown: str = ""

    @property
    def independent(self) -> bool:
        """No read depends on the inputs."""
        return not self.unknown and not self.dependent


class _Dependence(ShadowMode):
    """Follows which storages hold something that depends on the inputs (or on a random generator).

    Soundness: inputs, and whatever an op makes, are shadows; an op with a dependent operand makes all its results and all
    that it writes dependent. Only the model's own tensors are bare, and those it must not write at all: what it reads from
    them would differ from call to call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.dependent: list[Read] = []
        self._dependent: dict[int, StorageWeakRef] = {}  # a weak reference keeps the key from being given again
        self._models: dict[int, StorageWeakRef] = {}

    def shadow(self, tensor: torch.Tensor) -> Shadow:
        """An input."""
        self._mark(self._dependent, tensor)
        return Shadow(tensor, tensor.device)

    @staticmethod
    def _mark(table: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        table[reference.cdata] = reference

    def depends(self, tensor: torch.Tensor) -> bool:
        inside = tensor.inside if isinstance(tensor, Shadow) else tensor
        return storage_id(inside) in self._dependent

    def note(self, read: Read, depends: bool) -> None:
        self.reads.append(read)
        if depends:
            self.dependent.append(read)

    def follow(
        self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: Any, inner_args: Any, inner_kwargs: Any, outer: Any
    ) -> Any:
        for t in tensors:
            if t.layout is not torch.strided:
                raise ShadowError(f"a tensor has the layout {t.layout}")
            if not isinstance(t, Shadow):
                self._mark(self._models, t)
        depends = any(map(self.depends, tensors)) or torch.Tag.nondeterministic_seeded in func.tags
        by_name = given(func, args, kwargs)
        result = func(*inner_args, **inner_kwargs)
        if func in SCALAR_READS:
            self.note(Read.here(SCALAR_READS[func], result), depends)
        elif depends and _tells_by_its_shape(func, by_name):
            self.dependent.append(Read.here(op_name(func).removeprefix("aten::")))
        if func is aten.lift_fresh.default:  # a tensor that Python has just made of numbers
            outer = {}
            result = result.clone()
        for t in written(func, inner_args, inner_kwargs):
            if storage_id(t) in self._models:
                raise ShadowError("forward writes into a tensor of the model")
            if depends:
                self._mark(self._dependent, t)
        if depends and not _reads_sizes_only(func, by_name):
            for t in pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self._mark(self._dependent, t)
        devices = [t.device for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return clothe(result, outer, devices[0]) if devices else result


class _MemoryReadsOfShadows(ShadowFunctions):
    """Lets Python have the memory of a shadow that does not depend on the inputs. (That of another cannot be had at all.)"""

    def __init__(self, mode: _Dependence):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in MEMORY_READS:
            tensor, *rest = args
            depends = self.mode.depends(tensor)
            bare = tensor.inside if isinstance(tensor, Shadow) else tensor
            self.mode.note(Read.here(MEMORY_READS[func], bare.tolist()), depends)
            args = (tensor if depends else bare, *rest)
        return super().__torch_function__(func, types, args, kwargs)


def _tells_by_its_shape(func: OpOverload, by_name: dict[str, Any]) -> bool:
    """The size of the result depends on values (nonzero, unique, x[mask])."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is not aten.index.Tensor:
        return True
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in by_name["indices"])


def _reads_sizes_only(func: OpOverload, by_name: dict[str, Any]) -> bool:
    return op_name(func).removeprefix("aten::") in _OF_SIZES and not isinstance(by_name.get("fill_value"), torch.Tensor)


_OF_SIZES = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())
"""Ops that take sizes, dtype and device of a tensor, but no value. (Memory that is not initialised is nobody's value.)"""


def dependence_of_reads(source: Source, reads: Sequence[Read]) -> Dependence:
    """Run the model on shadows of the first example, and say which of `reads`, those of an ordinary run, depend on the inputs.

    A read that does not is the same for all inputs of these sizes, so that a trace may hold its value.
    """
    mode = _Dependence()
    try:
        arguments = source.signature.arguments([mode.shadow(t.clone()) for t in source.tensors])
        with undisturbed(source.model), seeded(), mode, _MemoryReadsOfShadows(mode):
            call_model(source.model, arguments)
    except Exception as error:  # whatever shadows cannot follow: then nothing is proven
        return Dependence(unknown=f"{type(error).__name__}: {first_line(error)}")
    if mode.reads != list(reads):
        return Dependence(unknown="the model reads other values when it runs on shadows")
    return Dependence(tuple(mode.dependent))


class _ValueSized(TorchDispatchMode):
    """Notes the ops whose results' sizes depend on values: Python may read those sizes without asking for any value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if _tells_by_its_shape(func, given(func, args, kwargs or {})):
            self.found[f"the size of {op_name(func).removeprefix('aten::')}"] = None
        return func(*args, **(kwargs or {}))


def value_sized(source: Source) -> list[str]:
    """The ops of the model that make a tensor as large as its values say (`nonzero`, `unique`, a mask as an index)."""
    arguments = pytree.tree_map_only(torch.Tensor, torch.clone, source.examples[0].arguments)
    with undisturbed(source.model), seeded(), _ValueSized() as mode:
        call_model(source.model, arguments)
    return list(mode.found)


# -- the verdict --------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """`lines` are for the report, one per tracer warning and per other read. `refusal` says why "auto" must not take it.

    `proof` says why reads do no harm, where that is proven.
    """

    lines: list[str] = field(default_factory=list)
    refusal: str = ""
    proof: str = ""


@dataclass(frozen=True)
class _Trial:
    """The model and its trace on one perturbed input; `difference` is "" where they agree."""

    kind: str
    reads: list[Read]
    difference: str


@dataclass
class _Subject:
    """A line of Python that torch warned about, or that reads values: what to call it.

    `unseen`: only tracing goes there (`if torch.jit.is_tracing()`), so that what it reads in an ordinary run is not known.
    """

    frame: Frame
    names: dict[str, None] = field(default_factory=dict)
    warned: bool = False
    reads_memory: bool = False
    unseen: bool = False


def verdict_on_trace(
    program: Program, source: Source, heard: Sequence[warnings.WarningMessage], *, proof_needed: bool = False
) -> Verdict:
    """Judge a traced Program: run it and the model on perturbed inputs, and give each tracer warning its verdict.

    `heard` are the warnings of the capture. With `proof_needed`, reads that are not proven to be harmless are a refusal at
    once.
    """
    tracer = [w for w in heard if issubclass(w.category, torch.jit.TracerWarning)]
    with lines_run({(w.filename, w.lineno) for w in tracer}) as ran:
        reads = run_eagerly(source, source.tensors).reads
    subjects = _subjects(tracer, reads)
    for s in subjects:
        s.unseen = s.warned and s.frame not in ran
    sized = value_sized(source) if proof_needed else []
    proven = (
        (not (reads or sized) or dependence_of_reads(source, reads).independent)
        # Every line where torch saw memory read is one where a read was recorded, too.
        and all(_at(s, reads) for s in subjects if s.reads_memory)
    )
    by_numpy = [f"numpy at {spelled(s.frame)}" for s in subjects if s.reads_memory]
    unproven = [] if proven else [*map(str, reads), *sized] or by_numpy
    if proof_needed and unproven:
        return Verdict(
            refusal=f"forward reads tensor values in Python ({', '.join(dict.fromkeys(unproven))}), and a trace holds only "
            "what the example inputs gave; where that is right, ask for frontend='trace'"
        )
    trials = list(_trials(program, source))
    judged = [(s, _verdict_on(s, reads, trials, proven, source.is_dynamic)) for s in subjects]
    lines = [f"{spelled(s.frame)}: {', '.join(s.names)}: {verdict}" for s, verdict in judged]
    refusal = ""
    for trial in trials:
        if trial.difference:
            refusal = (
                f"the trace is wrong for other inputs: with {trial.kind} inputs it differs from the model ({trial.difference})"
            )
            if all(_at(s, trial.reads) == _at(s, reads) and not s.unseen for s in subjects):
                lines.append(f"{refusal}, and no value that was read explains it")
            break
    return Verdict(lines, refusal, "what forward reads in Python does not depend on the inputs" if proven and reads else "")


def _trials(program: Program, source: Source) -> Iterator[_Trial]:
    others = [("another example's", e.tensors) for e in source.examples[1:]]
    for kind, tensors in (*others, *perturbed(source.tensors)):
        try:
            eager = run_eagerly(source, tensors)
        except Exception:  # the model itself rejects these values: they tell nothing
            continue
        yield _Trial(kind, eager.reads, how_it_differs(program, tensors, eager.outputs))


def how_it_differs(program: Program, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str:
    """In words, how what the Program gives on `tensors` differs from `expected`; "" when it does not."""
    try:
        with seeded():
            got = program.run(*(t.clone() for t in tensors))
    except Exception as error:
        return f"it raises {type(error).__name__}: {first_line(error)}"
    result = compare(expected, got)
    if result.problem:
        return result.problem
    return f"SQNR {result.sqnr_db:.0f} dB" if result.sqnr_db < SMALLEST_SQNR_OF_A_TRACE else ""


def _subjects(tracer: Sequence[warnings.WarningMessage], reads: Sequence[Read]) -> list[_Subject]:
    """Lines that torch warned about, in order, then those that read values without a warning."""
    subjects: dict[Frame, _Subject] = {}
    for w in tracer:
        subject = subjects.setdefault((w.filename, w.lineno), _Subject((w.filename, w.lineno), warned=True))
        subject.names[_short(w)] = None
        subject.reads_memory |= "to a NumPy array" in str(w.message) or "to a Python list" in str(w.message)
    for read in reads:
        if read.innermost not in subjects and (read.user not in subjects or not subjects[read.user].warned):
            subjects.setdefault(read.user, _Subject(read.user)).names[f"{read.how} reads a value in Python"] = None
    return list(subjects.values())


def _short(warning: warnings.WarningMessage) -> str:
    """What torch says happened, without what it says about traces in general."""
    text = str(warning.message).splitlines()[0]
    return text.split(" might cause the trace")[0].split(". ")[0].rstrip(".")


def _at(subject: _Subject, reads: Sequence[Read]) -> list[tuple[str, str]]:
    """What was read at a line, in order."""
    return [(r.how, r.value) for r in reads if subject.frame in (r.innermost, r.user)]


def _verdict_on(subject: _Subject, reads: Sequence[Read], trials: Sequence[_Trial], proven: bool, sizes_vary: bool) -> str:
    here = _at(subject, reads)
    differs = [t for t in trials if _at(subject, t.reads) != here]
    mattered = [t for t in differs if t.difference]
    if mattered:
        return f"mattered: with {mattered[0].kind} inputs the trace differs ({mattered[0].difference})"
    wrong = [t for t in trials if t.difference]
    if subject.unseen and wrong:
        return f"may have mattered: with {wrong[0].kind} inputs the trace differs ({wrong[0].difference})"
    if not here and not differs and not subject.reads_memory and not subject.unseen:
        if sizes_vary:
            return "comes from sizes or constants, and sizes vary: see the trial of other sizes"
        return "cannot matter: it comes from sizes or constants, and sizes are baked in"
    if proven and not subject.unseen:
        return "cannot matter: the value does not depend on the inputs"
    if not trials:
        return "unknown: the model takes none of the perturbed inputs"
    count = f"{len(trials)} perturbed input{'s' if len(trials) > 1 else ''}"
    if differs:
        return f"did not matter on {count}, though the value is another one with {differs[0].kind} inputs"
    return f"did not matter on {count}" + ("" if subject.unseen else ": the value was the same")
