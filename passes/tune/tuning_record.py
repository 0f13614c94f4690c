"""Which variant of a kernel is fastest on this machine: measured on example tensors, recorded, replayed.

    records = TuningRecords()
    records.best(workload, lambda: {"fused": call, "apart": other}, VARIANTS).variant                         measured
    records.save("tuning.json")
    TuningRecords.load("tuning.json").best(workload, ..., VARIANTS).variant                   replayed: the same variant

A workload is the line that a kernel's `workload_key` gives: all that the speed of its variants depends on. The first variant is
the default. Another one replaces it only if it takes at most nine tenths of its time, in the median and in the fastest call, in
two measurements in a row: noise should not change graphs from run to run.

Measuring takes milliseconds per workload, on a busy machine seconds per model. So there is a budget; workloads that come after
it is spent get their default variant, and are neither measured nor recorded.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ir_tools.errors import ModelFileError, OptionError
from ir_tools.files import write_atomically
from passes.tune.timing import current_timer, milliseconds

FORMAT = 1
FASTER = 0.9
"""A variant replaces the default when it takes at most this part of the default's time."""

BUDGET = 2.0
"""Seconds of measuring in all. The workload that is being measured when they are spent is measured to the end."""

Variants = Mapping[str, Callable[[], Any]]


def this_machine() -> str:
    """What a record depends on besides its workload."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


@dataclass(frozen=True)
class TuningRecord:
    """The best variant of one workload, median seconds per call of each (three digits, the default first), and the machine.

    There are no seconds if the workload was not measured.
    """

    variant: str
    seconds: dict[str, float]
    machine: str

    @property
    def is_default(self) -> bool:
        return not self.seconds or self.variant == next(iter(self.seconds))

    @property
    def reason(self) -> str:
        figures = ", ".join(f"{milliseconds(seconds)} ms {name}" for name, seconds in self.seconds.items())
        return f"the variant {self.variant} is faster here: {figures}"


@dataclass
class TuningRecords:
    """A table from workloads to records.

    - `measured`, `replayed`, `unmeasured`: the workloads requested since it was made. `spent`: seconds of measuring.
    - `budget`, `machine`, `clock`: the most seconds of measuring, the machine that records are made on, the time now.
    """

    table: dict[str, TuningRecord] = field(default_factory=dict)
    source: str = ""
    measured: set[str] = field(default_factory=set)
    replayed: set[str] = field(default_factory=set)
    unmeasured: set[str] = field(default_factory=set)
    spent: float = 0.0
    budget: float = BUDGET
    machine: str = field(default_factory=this_machine)
    clock: Callable[[], float] = perf_counter

    def best(self, workload: str, variants: Callable[[], Variants], among: Collection[str]) -> TuningRecord:
        """The record of the workload, if its variant is `among` those there are; else measure what `variants` returns.

        Each workload is measured once. After the budget is spent, the result is the first one of `among`.
        """
        known = self.table.get(workload)
        if known is None or known.variant not in among:
            if self.spent >= self.budget:
                self.unmeasured.add(workload)
                return TuningRecord(next(iter(among)), {}, self.machine)
            start = self.clock()
            self.table[workload] = fastest(variants(), self.machine)
            self.spent += self.clock() - start
            self.measured.add(workload)
        elif workload not in self.measured:
            self.replayed.add(workload)
        return self.table[workload]

    def replay(self, path: str) -> None:
        """Take the records of a file that `save` wrote, unless they are those already. Raises `OptionError` as `load` does."""
        if self.source != path:
            loaded = TuningRecords.load(path)
            self.table, self.source = loaded.table, loaded.source

    @property
    def requested(self) -> set[str]:
        return self.measured | self.replayed | self.unmeasured

    @property
    def not_default(self) -> list[str]:
        """The requested workloads for which another variant than the default is best."""
        return [w for w, record in self.table.items() if w in self.measured | self.replayed and not record.is_default]

    def __str__(self) -> str:
        """A line for the report."""
        counts = f"{len(self.measured)} workloads measured, {len(self.replayed)} replayed"
        others = f"{len(self.not_default)} with a faster variant than the default"
        return "; ".join([counts, others, *self._over_budget()])

    def notes(self) -> list[str]:
        """What the user should know about a replay, and about what was not measured."""
        return [*self._about_replay(), *self._over_budget()]

    def _over_budget(self) -> list[str]:
        count = len(self.unmeasured)
        return [f"{count} workloads not measured: the budget of {self.budget:g} s was spent"] if count else []

    def _about_replay(self) -> list[str]:
        if not self.source:
            return []
        others = sorted({self.table[w].machine for w in self.replayed} - {self.machine})
        notes = [f"{self.source}: tuning records of another machine ({other}; this is {self.machine}) were used as they are"
                 for other in others]  # fmt: skip
        if self.measured:
            notes.append(f"{self.source} lacks {len(self.measured)} workloads of this model, which were measured")
        return notes

    # Records were once called choices, and variants forms. The keys "choices" and "form" of the file, and of the manifest of a
    # saved model, stay: this version reads the files of earlier ones, and earlier ones read its files.

    def to_dict(self) -> dict[str, Any]:
        """The table as `json.dumps` takes it."""
        rows = {w: {"form": r.variant, "seconds": r.seconds, "machine": r.machine} for w, r in self.table.items()}
        return {"format": FORMAT, "choices": rows}

    @classmethod
    def from_dict(cls, data: Any, source: str = "the given table") -> TuningRecords:
        """The table that `to_dict` returned. Raises `OptionError` saying what is wrong in `source`."""

        def refuse(what: str) -> OptionError:
            expected = f'{{"format": {FORMAT}, "choices": {{workload: {{"form", "seconds", "machine"}}}}}}'
            return OptionError(
                f"{source} holds no tuning records: {what}; expected {expected}, as `tuning_records.save` writes it"
            )

        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("choices"), dict):
            raise refuse(f"got {str(data)[:60]!r}")
        table = {}
        for workload, row in data["choices"].items():
            if not _is_row(row):
                raise refuse(f"at {workload!r} got {str(row)[:100]!r}")
            table[workload] = TuningRecord(row["form"], {k: float(v) for k, v in row["seconds"].items()}, row["machine"])
        return cls(table, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, to be replayed by `optimize(..., tuning_records=path)`.

        Raises `ModelFileError` when the path cannot be written.
        """
        try:
            write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise ModelFileError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TuningRecords:
        """Read what `save` wrote. Raises `OptionError` for a file that is missing or holds something else."""
        wanted = "a file that `tuning_records.save` wrote"
        if not isinstance(path, (str, os.PathLike)):
            raise OptionError(f"tuning_records must be the path of {wanted}, got {type(path).__name__}")
        name = os.fspath(path)
        try:
            data = json.loads(Path(name).read_bytes())
        except OSError as error:
            raise OptionError(f"tuning_records={name!r} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise OptionError(f"tuning_records={name!r} must be {wanted}, and is no JSON: {error}") from error
        return cls.from_dict(data, name)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("machine"), str) or not isinstance(row.get("seconds"), dict):
        return False
    return row.get("form") in row["seconds"] and all(type(v) in (int, float) and v >= 0 for v in row["seconds"].values())


def fastest(variants: Variants, machine: str) -> TuningRecord:
    """Measure in few rounds; if the default loses, measure again in more rounds, and the second measurement counts."""
    record = record_of(measure(variants), machine)
    return record if record.is_default else record_of(measure(variants, least_rounds=5), machine)


def record_of(times: Mapping[str, Sequence[float]], machine: str = "") -> TuningRecord:
    """The variant of the least median, if it beats the first one by the margin: in the median, and in its fastest call.

    >>> record_of({"fused": [1.0, 1.0, 1.1], "apart": [0.95], "plain": [0.96]}).variant
    'fused'
    >>> record_of({"fused": [1.0, 1.0, 1.1], "apart": [0.8], "plain": [0.7]}).variant
    'plain'
    >>> record_of({"fused": [1.0, 9.0, 9.0], "apart": [1.0], "plain": [1.2]}).variant    # others kept the machine busy
    'fused'
    """
    medians = {name: float(f"{statistics.median(values):.3g}") for name, values in times.items()}
    default, best = next(iter(medians)), min(medians, key=medians.__getitem__)
    wins = medians[best] <= FASTER * medians[default] and min(times[best]) <= FASTER * min(times[default])
    return TuningRecord(best if wins else default, medians, machine)


def measure(variants: Variants, least_rounds: int = 1) -> dict[str, list[float]]:
    """Seconds of calls of each variant, in interleaved rounds for about 10 ms, 25 rounds at most."""
    return current_timer()(variants, seconds=0.01, least_rounds=least_rounds, most_rounds=25, warm_up=1)
