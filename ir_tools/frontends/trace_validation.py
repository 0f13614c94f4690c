"""Trace validation: whether a trace holds for other inputs than the example, and whether each tracer warning mattered.

    value read at a warned line          output of the trace          finding on the warning
    none: it comes from sizes            -                            cannot matter: sizes are baked in
    cannot be seen: only tracing         as the model's               did not matter on N perturbed inputs
        goes there                       another for some input       may have mattered
    proven not to depend on the inputs   -                            cannot matter
    the same for every input tried       as the model's               did not matter on N perturbed inputs
    another for some input               as the model's               did not matter on N, though the value differs
    another for some input               another for that input       mattered: with such inputs the trace differs

The model runs eagerly on each perturbed input under `recorded_reads`; the traced Program runs on the same input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ir_tools.frontends.perturbed_inputs import perturbed
from ir_tools.frontends.python_frames import Frame, location_of
from ir_tools.frontends.read_dependence import dependence_of_reads, value_sized
from ir_tools.frontends.source import Source
from ir_tools.frontends.trials import how_it_differs
from ir_tools.frontends.value_reads import Read, lines_run, run_eagerly
from ir_tools.ir import Program


@dataclass
class TraceValidation:
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


def validate_trace(
    program: Program, source: Source, heard: Sequence[warnings.WarningMessage], *, proof_needed: bool = False
) -> TraceValidation:
    """Validate a traced Program: run it and the model on perturbed inputs, and say of each tracer warning whether it mattered.

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
    by_numpy = [f"numpy at {location_of(s.frame)}" for s in subjects if s.reads_memory]
    unproven = [] if proven else [*map(str, reads), *sized] or by_numpy
    if proof_needed and unproven:
        return TraceValidation(
            refusal=f"forward reads tensor values in Python ({', '.join(dict.fromkeys(unproven))}), and a trace holds only "
            "what the example inputs gave; where that is right, ask for frontend='trace'"
        )
    trials = list(_trials(program, source))
    findings = [(s, _finding(s, reads, trials, proven, source.is_dynamic)) for s in subjects]
    lines = [f"{location_of(s.frame)}: {', '.join(s.names)}: {finding}" for s, finding in findings]
    refusal = ""
    for trial in trials:
        if trial.difference:
            refusal = (
                f"the trace is wrong for other inputs: with {trial.kind} inputs it differs from the model ({trial.difference})"
            )
            if all(_at(s, trial.reads) == _at(s, reads) and not s.unseen for s in subjects):
                lines.append(f"{refusal}, and no value that was read explains it")
            break
    proof = "what forward reads in Python does not depend on the inputs" if proven and reads else ""
    return TraceValidation(lines, refusal, proof)


def _trials(program: Program, source: Source) -> Iterator[_Trial]:
    others = [("another example's", e.tensors) for e in source.examples[1:]]
    for kind, tensors in (*others, *perturbed(source.tensors)):
        try:
            eager = run_eagerly(source, tensors)
        except Exception:  # the model itself rejects these values: no finding
            continue
        yield _Trial(kind, eager.reads, how_it_differs(program, tensors, eager.outputs))


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


def _finding(subject: _Subject, reads: Sequence[Read], trials: Sequence[_Trial], proven: bool, sizes_vary: bool) -> str:
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
