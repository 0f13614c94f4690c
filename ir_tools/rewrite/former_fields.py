"""Fields that a rewrite log had, and which are artifacts now. They work for one more release, with a `DeprecationWarning`.

log.ranges             ->  a parameter `ranges: Ranges` of the pass
log.casts = casts      ->  `return after, casts`
log.tuning_records     ->  a parameter `tuning: TuningRecords`, or `artifacts.get(TuningRecords)` behind the pass
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ir_tools.deprecation import warn_renamed
from ir_tools.rewrite.artifacts import Artifacts

RANGES = "ir_tools.verify.ranges.Ranges"
CASTS = "ir_tools.rewrite.cast.Casts"
TUNING_RECORDS = "passes.tune.tuning_record.TuningRecords"
"""The classes by their full names: this package imports none of their modules."""


class FormerFields:
    """The old fields, read from and entered into the artifacts that the pass of this log works with."""

    _artifacts: Artifacts | None = None  # these are no fields of the dataclass, which is a subclass
    _entered = Artifacts()
    _running = False

    @contextmanager
    def working_with(self, artifacts: Artifacts | None) -> Iterator[Artifacts]:
        """The artifacts of one run of a pass: the given ones; without any, those that were entered before under the old names.

        What the run enters or gives stays to be read from the log, and no later run is given it.
        """
        self._artifacts = Artifacts(*self._entered) if artifacts is None else artifacts
        self._running = True
        try:
            yield self._artifacts
        finally:
            self._running = False

    def _former(self, name: str, kind: str) -> Any:
        warn_renamed(f"{name} of a rewrite log", f"the artifact {kind.rpartition('.')[2]} of a pass")
        found = [artifact for artifact in self._artifacts or () if _full_name(type(artifact)) == kind]
        return found[0] if found else None

    def _enter(self, name: str, artifact: Any) -> None:
        warn_renamed(f"{name} of a rewrite log", f"the artifact {type(artifact).__name__} of a pass")
        if self._artifacts is None:
            self._artifacts = Artifacts()
        self._artifacts.put(artifact)
        if not self._running:
            self._entered = Artifacts(*self._entered, artifact)

    @property
    def ranges(self) -> Any:
        return self._former("ranges", RANGES) or {}

    @property
    def casts(self) -> Any:
        return self._former("casts", CASTS)

    @casts.setter
    def casts(self, casts: Any) -> None:
        self._enter("casts", casts)

    @property
    def tuning_records(self) -> Any:
        return self._former("tuning_records", TUNING_RECORDS)

    @tuning_records.setter
    def tuning_records(self, records: Any) -> None:
        self._enter("tuning_records", records)

    @property
    def choices(self) -> Any:
        return self._former("choices", TUNING_RECORDS)

    @choices.setter
    def choices(self, records: Any) -> None:
        self._enter("choices", records)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
