"""What `optimize` did: per pass and overall. Prints as a table, exports as a dict."""

from __future__ import annotations

from dataclasses import dataclass, field

from ir_tools.rewrite.journal import Refusal, Rewrite


@dataclass
class StepReport:
    """One pass. `sqnr_db` and `max_abs_error` compare the Program after it with the user's eager model."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    declares: str = "exact"
    seconds: float = 0.0
    nodes_before: int = 0
    nodes_after: int = 0
    rewrites: list[Rewrite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    max_abs_error: float | None = None
    sqnr_db: float | None = None
    tolerance: str = ""


@dataclass
class Report:
    """The whole run."""

    frontend: str = ""
    frontend_reason: str = ""
    frontend_refusals: dict[str, str] = field(default_factory=dict)
    engine: str = ""
    capture_seconds: float = 0.0
    captured_nodes: int = 0
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
