"""What `optimize` did, as data: per pass and overall."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ir_tools.deprecation import warn_renamed
from ir_tools.rewrite.cast import Casts
from ir_tools.rewrite.nearest import NearMiss
from ir_tools.rewrite.numeric_effects import NumericEffect, declaration
from ir_tools.rewrite.rewrite_log import Refusal, Rewrite
from passes.report.formatting import option
from passes.tune.speed_comparison import Speed
from passes.tune.tuning_record import TuningRecords


@dataclass
class StepReport:
    """One pass. `sqnr_db` and `max_abs_error` compare the Program after it with the user's eager model.

    `effects`: what it may do to numbers, none where it is exact. `ranges`: the calls on which magnitudes of values were
    observed, for a pass that needs them. `casts`: count and bytes of its casts. `reverted`: why `optimize` returned the model
    without this pass, "" where it did not.
    """

    name: str
    options: dict[str, object] = field(default_factory=dict)
    effects: tuple[NumericEffect, ...] = ()
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    near_misses: list[NearMiss] = field(default_factory=list)
    max_abs_error: float | None = None
    sqnr_db: float | None = None
    tolerance: str = ""
    ranges: str = ""
    casts: Casts | None = None
    reverted: str = ""

    @property
    def declares(self) -> str:
        """The old word for `effects`."""
        warn_renamed("declares of a step", "effects")
        return declaration(self.effects)

    @property
    def changed(self) -> bool:
        """The pass changed the result of `optimize`."""
        return not self.reverted and self.rewrote

    @property
    def rewrote(self) -> bool:
        return bool(self.rewrites) or self.nodes_before != self.nodes_after


@dataclass
class ReportData:
    """The whole run. `tuning_records` are those of the lowering, None where it measures nothing.

    `speed` is the comparison of the first pass that asks for one and changed something, None where there is none.
    """

    frontend: str = ""
    frontend_reason: str = ""
    frontend_refusals: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    capture_seconds: float = 0.0
    captured_nodes: int = 0
    captured_ops: dict[str, int] = field(default_factory=dict)
    captured_sqnr_db: float | None = None
    captured_max_abs_error: float | None = None
    steps: list[StepReport] = field(default_factory=list)
    emit_seconds: float = 0.0
    verified: bool = False
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    ops_left: dict[str, int] = field(default_factory=dict)
    dry_run: bool = False
    tuning_records: TuningRecords | None = None
    speed: Speed | None = None

    @property
    def changed(self) -> bool:
        """Some pass rewrote something."""
        return any(step.changed for step in self.steps)

    @property
    def choices(self) -> TuningRecords | None:
        """The old name of `tuning_records`."""
        warn_renamed("report.choices", "report.tuning_records")
        return self.tuning_records

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and finite numbers: what `json.dumps` takes.

        A number that JSON cannot hold (the SQNR of equal tensors is infinite) becomes the string "inf" or "nan". The key
        "choices" is the old name of "tuning_records", and "declares" of a step that of "effects", for one more release.
        """
        records = self.tuning_records.to_dict() if self.tuning_records is not None else None
        speed = _plain(self.speed.to_dict()) if self.speed is not None else None
        data = _plain(asdict(self))
        for step, as_dict in zip(self.steps, data["steps"], strict=True):
            as_dict["declares"] = declaration(step.effects)
        return {**data, "changed": self.changed, "tuning_records": records, "choices": records, "speed": speed}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return option(value)
