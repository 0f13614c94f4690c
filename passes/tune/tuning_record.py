"""Which of several forms of an op runs fastest here: measured on random tensors, recorded, replayed.

    choices = Choices()
    choices.choose(signature, lambda: {"fused": call, "apart": other}, FORMS).form      measured
    choices.save("choices.json")
    Choices.load("choices.json").choose(signature, ..., FORMS).form                     replayed: the same form

The first form is the favourite. It stays unless another one takes at most nine tenths of its time, in the median and in the
fastest call, twice in a row: noise should not change graphs from run to run.

Measuring takes milliseconds per signature, on a busy machine seconds per model. So there is a budget; signatures that come when
it is spent get their favourite, unmeasured and unrecorded.
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

from ir_tools.emit.errors import ModelFileError
from ir_tools.files import write_atomically
from ir_tools.rewrite import OptionError
from passes.tune.timing import interleaved_seconds, milliseconds

FORMAT = 1
FASTER = 0.9
"""A form replaces the favourite when it takes at most this part of the favourite's time."""

BUDGET = 2.0
"""Seconds of measuring in all. What is being measured when they are spent is measured to the end."""

Forms = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Choice:
    """The form taken, median seconds per call of each form (three digits, the favourite first), and on which machine.

    Of one that was not measured, there are no seconds.
    """

    form: str
    seconds: dict[str, float]
    machine: str

    @property
    def is_favourite(self) -> bool:
        return not self.seconds or self.form == next(iter(self.seconds))

    @property
    def reason(self) -> str:
        figures = ", ".join(f"{milliseconds(seconds)} ms {name}" for name, seconds in self.seconds.items())
        return f"{self.form} is faster here: {figures}"


@dataclass
class Choices:
    """A table from signatures to choices.

    `measured`, `replayed` and `unmeasured` are the signatures asked for since it was made, `spent` the seconds of measuring.
    """

    table: dict[str, Choice] = field(default_factory=dict)
    source: str = ""
    measured: set[str] = field(default_factory=set)
    replayed: set[str] = field(default_factory=set)
    unmeasured: set[str] = field(default_factory=set)
    spent: float = 0.0

    def choose(self, signature: str, forms: Callable[[], Forms], among: Collection[str]) -> Choice:
        """The recorded choice, if it is `among` the forms there are; else measure the calls that `forms` makes.

        Equal signatures are measured once. When the budget is spent, it is the first one of `among`.
        """
        known = self.table.get(signature)
        if known is None or known.form not in among:
            if self.spent >= BUDGET:
                self.unmeasured.add(signature)
                return Choice(next(iter(among)), {}, machine())
            start = perf_counter()
            self.table[signature] = fastest(forms())
            self.spent += perf_counter() - start
            self.measured.add(signature)
        elif signature not in self.measured:
            self.replayed.add(signature)
        return self.table[signature]

    @property
    def asked(self) -> set[str]:
        return self.measured | self.replayed | self.unmeasured

    @property
    def unusual(self) -> list[str]:
        """Signatures asked for whose favourite was not taken."""
        return [s for s, choice in self.table.items() if s in self.measured | self.replayed and not choice.is_favourite]

    def __str__(self) -> str:
        """A line for the report."""
        counts = f"{len(self.measured)} signatures measured, {len(self.replayed)} replayed"
        return "; ".join([counts, f"{len(self.unusual)} in another form, being faster so", *self._over_budget()])

    def notes(self) -> list[str]:
        """What the user should know about a replay, and about what was not measured."""
        return [*self._about_replay(), *self._over_budget()]

    def _over_budget(self) -> list[str]:
        count = len(self.unmeasured)
        return [f"{count} signatures not measured: the budget of {BUDGET:g} s was spent"] if count else []

    def _about_replay(self) -> list[str]:
        if not self.source:
            return []
        here = machine()
        others = sorted({self.table[s].machine for s in self.replayed} - {here})
        notes = [f"{self.source}: choices recorded on another machine ({other}; this is {here}) were used as they are"
                 for other in others]  # fmt: skip
        if self.measured:
            notes.append(f"{self.source} lacks {len(self.measured)} signatures of this model, which were measured")
        return notes

    def to_dict(self) -> dict[str, Any]:
        """The table as `json.dumps` takes it."""
        rows = {s: {"form": c.form, "seconds": c.seconds, "machine": c.machine} for s, c in self.table.items()}
        return {"format": FORMAT, "choices": rows}

    @classmethod
    def from_dict(cls, data: Any, source: str = "the given table") -> Choices:
        """The table that `to_dict` gave. Raises `OptionError` saying what is wrong in `source`."""

        def refuse(what: str) -> OptionError:
            expected = f'{{"format": {FORMAT}, "choices": {{signature: {{"form", "seconds", "machine"}}}}}}'
            return OptionError(f"{source} holds no recorded choices: {what}; expected {expected}, as `choices.save` writes it")

        if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("choices"), dict):
            raise refuse(f"got {str(data)[:60]!r}")
        table = {}
        for signature, row in data["choices"].items():
            if not _is_row(row):
                raise refuse(f"at {signature!r} got {str(row)[:100]!r}")
            table[signature] = Choice(row["form"], {k: float(v) for k, v in row["seconds"].items()}, row["machine"])
        return cls(table, source)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON, to be replayed by `optimize(..., choices=path)`.

        Raises `ModelFileError` when the path cannot be written.
        """
        try:
            write_atomically(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())
        except OSError as error:
            raise ModelFileError(f"{os.fspath(path)} cannot be written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Choices:
        """Read what `save` wrote. Raises `OptionError` for a file that is missing or holds something else."""
        if not isinstance(path, (str, os.PathLike)):
            raise OptionError(f"choices must be the path of a file that `choices.save` wrote, got {type(path).__name__}")
        name = os.fspath(path)
        try:
            data = json.loads(Path(name).read_bytes())
        except OSError as error:
            raise OptionError(f"choices={name!r} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise OptionError(f"choices={name!r} must be a file that `choices.save` wrote, and is no JSON: {error}") from error
        return cls.from_dict(data, name)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("machine"), str) or not isinstance(row.get("seconds"), dict):
        return False
    return row.get("form") in row["seconds"] and all(type(v) in (int, float) and v >= 0 for v in row["seconds"].values())


def fastest(forms: Forms) -> Choice:
    """Measure in a hurry; where the favourite loses, measure again with more care, and that counts."""
    choice = choice_from(measure(forms))
    return choice if choice.is_favourite else choice_from(measure(forms, least_rounds=5))


def choice_from(times: Mapping[str, Sequence[float]]) -> Choice:
    """The form of the least median, if it beats the first one by the margin: in the median, and in its fastest call.

    >>> choice_from({"fused": [1.0, 1.0, 1.1], "apart": [0.95], "plain": [0.96]}).form
    'fused'
    >>> choice_from({"fused": [1.0, 1.0, 1.1], "apart": [0.8], "plain": [0.7]}).form
    'plain'
    >>> choice_from({"fused": [1.0, 9.0, 9.0], "apart": [1.0], "plain": [1.2]}).form    # others kept the machine busy
    'fused'
    """
    medians = {name: float(f"{statistics.median(values):.3g}") for name, values in times.items()}
    favourite, best = next(iter(medians)), min(medians, key=medians.__getitem__)
    wins = medians[best] <= FASTER * medians[favourite] and min(times[best]) <= FASTER * min(times[favourite])
    return Choice(best if wins else favourite, medians, machine())


def measure(forms: Forms, least_rounds: int = 1) -> dict[str, list[float]]:
    """Seconds of calls of each form, in interleaved rounds for about 10 ms, 25 rounds at most."""
    return interleaved_seconds(forms, seconds=0.01, least_rounds=least_rounds, most_rounds=25, warm_up=1)


def machine() -> str:
    """What choices depend on besides their signature."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
