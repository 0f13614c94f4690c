"""Fields that a rewrite log had, and which are artifacts now. They work for one more release, with a `DeprecationWarning`.

log.ranges             ->  a parameter `ranges: Ranges` of the pass
log.casts = casts      ->  `return after, casts`
log.tuning_records     ->  a parameter `tuning: TuningRecords`, or `artifacts.get(TuningRecords)` behind the pass
"""

from __future__ import annotations

from typing import Any

from ir_tools.deprecation import warn_renamed
from ir_tools.rewrite.artifacts import Artifacts


class FormerFields:
    """The old fields, read from and entered into the artifacts that the pass of this log works with."""

    _artifacts: Any = None  # no annotation of a dataclass: it is no field

    def bind(self, artifacts: Artifacts | None) -> Artifacts:
        """Those that the pass works with: the given ones; without any, those that were entered under the old names."""
        if artifacts is None:
            artifacts = self._artifacts or Artifacts()
        self._artifacts = artifacts
        return artifacts

    def _former(self, name: str, kind: str) -> Any:
        warn_renamed(f"{name} of a rewrite log", f"the artifact {kind} of a pass")
        found = [artifact for artifact in self._artifacts or () if type(artifact).__name__ == kind]
        return found[0] if found else None

    def _enter(self, name: str, artifact: Any) -> None:
        warn_renamed(f"{name} of a rewrite log", f"the artifact {type(artifact).__name__} of a pass")
        self.bind(self._artifacts).put(artifact)

    @property
    def ranges(self) -> Any:
        return self._former("ranges", "Ranges") or {}

    @property
    def casts(self) -> Any:
        return self._former("casts", "Casts")

    @casts.setter
    def casts(self, casts: Any) -> None:
        self._enter("casts", casts)

    @property
    def tuning_records(self) -> Any:
        return self._former("tuning_records", "TuningRecords")

    @tuning_records.setter
    def tuning_records(self, records: Any) -> None:
        self._enter("tuning_records", records)

    @property
    def choices(self) -> Any:
        return self._former("choices", "TuningRecords")

    @choices.setter
    def choices(self, records: Any) -> None:
        self._enter("choices", records)
