"""What `optimize` did: per pass and overall. Prints as a table, exports as a dict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ir_tools.rewrite.nearest import NearMiss
from ir_tools.rewrite.rewrite_log import Casts, Refusal, Rewrite
from ir_tools.rewrite.shapes import spelled_option
from passes.choices import Choices
from passes.speed import Speed

REASONS_SHOWN = 12
MODULES_SHOWN = 3


@dataclass
class StepReport:
    """One pass. `sqnr_db` and `max_abs_error` compare the Program after it with the user's eager model.

    `ranges`: what the magnitudes of values were observed on, for a pass that asks for them. `casts`: what its casts move.
    `reverted`: why the result of `optimize` is without this pass, "" where it is with it.
    """

    name: str
    options: dict[str, object] = field(default_factory=dict)
    declares: str = "exact"
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
    def changed(self) -> bool:
        """The result of `optimize` is another one because of this pass."""
        return not self.reverted and self.rewrote

    @property
    def rewrote(self) -> bool:
        return bool(self.rewrites) or self.nodes_before != self.nodes_after


@dataclass
class Report:
    """The whole run. `choices` are the measured ones of the lowering, None where it measures nothing.

    `speed` is the verdict on the first pass that asks for one and changed something, None where there is none.
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
    choices: Choices | None = None
    speed: Speed | None = None

    @property
    def changed(self) -> bool:
        """Some pass rewrote something."""
        return any(step.changed for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, strings and finite numbers: what `json.dumps` takes.

        A number that JSON cannot hold (the SQNR of equal tensors is infinite) becomes the string "inf" or "nan".
        """
        choices = self.choices.to_dict() if self.choices is not None else None
        speed = _plain(self.speed.to_dict()) if self.speed is not None else None
        return {**_plain(asdict(self)), "changed": self.changed, "choices": choices, "speed": speed}

    def __str__(self) -> str:
        """The report as text, 80 columns wide, without colour."""
        console = Console(file=StringIO(), width=80, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(self)
        assert isinstance(console.file, StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.header()
        yield Text("")
        yield self.table()
        yield from self.verdict()
        yield from self.refused()
        yield from self.missed()
        yield from self.noted()

    # -- the parts of the printed report ------------------------------------------------------------------------------

    def header(self) -> Table:
        """Front end and why, inputs, engine, choices measured: a two-column grid."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        reason = f" ({self.frontend_reason})" if self.frontend_reason else ""
        grid.add_row("front end", Text(f"{self.frontend or '-'}{reason}"))
        for name, why in self.frontend_refusals.items():
            grid.add_row("", Text(f"not {name}: {_first_line(why)}", style="yellow"))
        captured = f"{self.captured_nodes} ops"
        if self.capture_seconds:
            captured += f" in {_seconds(self.capture_seconds)} s"
        if self.captured_sqnr_db is not None:
            captured += f", {_agreement(self.captured_sqnr_db, self.captured_max_abs_error)}"
        grid.add_row("captured", Text(captured))
        if self.inputs:
            grid.add_row("inputs", Text("; ".join(self.inputs)))
        if self.engine:
            grid.add_row("engine", Text(self.engine))
        if self.choices is not None and self.choices.asked:
            grid.add_row("choices", Text(str(self.choices)))
        return grid

    def table(self) -> Table:
        """One row per pass. Refusals that go without saying are not counted."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
        table.add_column("pass", overflow="fold")
        for heading in ("rewrites", "refused", "nodes", "max error", "SQNR dB", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        for step in self.steps:
            refusals = len([r for r in step.refusals if not r.expected])
            nodes = f"{step.nodes_before}→{step.nodes_after}" if step.rewrote else str(step.nodes_after)
            details = [*(f"{k}={_option(v)}" for k, v in step.options.items()), *(["reverted"] if step.reverted else [])]
            table.add_row(
                Text("\n  ".join([step.name, *details])),
                Text(str(len(step.rewrites)), style="bold green" if step.rewrites else "dim"),
                Text(str(refusals), style="yellow" if refusals else "dim"),
                nodes,
                _error(step.max_abs_error),
                _decibel(step.sqnr_db, unit=""),
                _seconds(step.seconds),
                style="" if step.changed else "dim",
            )
        return table

    def verdict(self) -> Iterable[Text]:
        """Whether anything changed, and whether the numbers were checked."""
        yield Text("")
        if not self.changed:
            what = "nothing would change" if self.dry_run else "nothing changed"
            yield Text(f"{what}: no pass found anything to rewrite", style="bold yellow")
        yield from self.cast()
        if self.dry_run:
            yield Text("dry run: nothing was emitted", style="bold")
            return
        if self.verified:
            agreement = f": {_agreement(self.sqnr_db, self.max_abs_error)}" if self.sqnr_db is not None else ""
            yield Text(f"verified{agreement}", style="bold green")
        else:
            yield Text("not verified: no numbers were compared with the eager model", style="bold yellow")
        if self.speed is not None:
            known = self.speed.decision != "unknown"
            yield Text(str(self.speed), style="bold yellow" if self.speed.slower or not known else "bold green")
        if self.seconds:
            emitted = f", of which emission {_seconds(self.emit_seconds)} s" if self.emit_seconds else ""
            timed = f", the verdict on speed {_seconds(self.speed.seconds)} s" if emitted and self.speed is not None else ""
            yield Text(f"took {_seconds(self.seconds)} s{emitted}{timed}")
        if self.ops_left:
            most = sorted(self.ops_left.items(), key=lambda item: (-item[1], item[0]))
            shown = ", ".join(f"{name} ×{count}" for name, count in most[:8])
            yield Text(f"ops: {shown}" + (f", {len(most) - 8} other kinds" if len(most) > 8 else ""))

    def cast(self) -> Iterable[Text]:
        """What ranges were observed on, and what casts move: a line each for every pass that has them."""
        for step in self.steps:
            if step.ranges:
                yield Text(f"{step.name}: ranges observed on {step.ranges}")
            if step.casts is not None and any(t.count for t in (step.casts.before, step.casts.one_by_one, step.casts.after)):
                undone = " (reverted)" if step.reverted else ""
                yield Text(f"{step.name}: {_casts(step.casts)}{undone}")

    def refused(self, limit: int = REASONS_SHOWN, expected: bool = False) -> Iterable[Text | Padding]:
        """Refusals grouped by pass and reason, the most frequent first; with `expected` those too that go without saying."""
        groups: dict[tuple[str, str], list[Refusal]] = {}
        for step in self.steps:
            for refusal in step.refusals:
                if expected or not refusal.expected:
                    groups.setdefault((step.name, refusal.reason), []).append(refusal)
        if not groups:
            return
        yield Text("\nrefused", style="bold")
        ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
        for (name, reason), refusals in ordered[:limit]:
            line = f"{name}: {reason.rstrip('.')} ×{len(refusals)}"
            yield Padding(Text(line, style="yellow"), (0, 0, 0, 2), expand=False)
            yield Padding(Text(places([r.module for r in refusals])), (0, 0, 0, 4), expand=False)
        if len(ordered) > limit:
            more = sum(len(refusals) for _, refusals in ordered[limit:])
            yield Padding(Text(f"… {len(ordered) - limit} more reasons, {more} places"), (0, 0, 0, 2), expand=False)

    def rewritten(self) -> Iterable[Text | Padding]:
        """Rewrites grouped by pass and rule. Not part of the printed report; the CLI's `explain` shows it."""
        groups: dict[tuple[str, str], list[Rewrite]] = {}
        for step in self.steps:
            for rewrite in step.rewrites:
                groups.setdefault((step.name, rewrite.rule), []).append(rewrite)
        if not groups:
            return
        yield Text("\nwould fire" if self.dry_run else "\nfired", style="bold")
        for (name, rule), rewrites in groups.items():
            label = name if rule in ("", name) else f"{name}: {rule}"
            yield Padding(Text(f"{label} ×{len(rewrites)}", style="green"), (0, 0, 0, 2), expand=False)
            yield Padding(Text(places([r.module for r in rewrites])), (0, 0, 0, 4), expand=False)

    def missed(self) -> Iterable[Text | Padding]:
        """How near each rule came at the place asked for (`explain_at`); ops that one sentence holds for come together."""
        groups: dict[tuple[str, str, str], list[NearMiss]] = {}
        for step in self.steps:
            for miss in step.near_misses:
                groups.setdefault((step.name, miss.rule, miss.sentence), []).append(miss)
        if groups:
            yield Text("\nnearest misses", style="bold")
        for (name, rule, sentence), misses in groups.items():
            yield Padding(Text(f"{name}: {rule}", style="yellow"), (0, 0, 0, 2), expand=False)
            yield Padding(Text(f"{sentence.rstrip('.')} ({places([m.module for m in misses])})"), (0, 0, 0, 4), expand=False)

    def idle(self) -> Iterable[Text | Padding]:
        """Passes that found no place to act at all, not even one to refuse. Shown by the CLI's `explain`."""
        names = [step.name for step in self.steps if not step.rewrote and not step.refusals]
        if names:
            yield Text("\nfound nothing to do", style="bold")
            yield Padding(Text(", ".join(names)), (0, 0, 0, 2), expand=False)

    def noted(self) -> Iterable[Text | Padding]:
        if self.notes:
            yield Text("\nnotes", style="bold")
        for note in self.notes:
            yield Padding(Text(note), (0, 0, 0, 2), expand=False)


def places(modules: Sequence[str], limit: int = MODULES_SHOWN) -> str:
    """`layer1.0.bn1, layer1.0.bn2, layer1.1.bn1, … 20 more`: each module once, the first few."""
    distinct = list(dict.fromkeys(modules))
    more = len(distinct) - limit
    return ", ".join(distinct[:limit]) + (f", … {more} more" if more > 0 else "")


# -- numbers for people -----------------------------------------------------------------------------------------------


def _decibel(value: float | None, unit: str = " dB") -> str:
    if value is None:
        return "-"
    if math.isinf(value) and value > 0:
        return "equal"  # no noise at all: the outputs are bitwise those of the eager model
    return f"{value:.1f}{unit}"


def _agreement(sqnr_db: float, max_abs_error: float | None) -> str:
    if math.isinf(sqnr_db) and sqnr_db > 0:
        return "bitwise equal to the eager model"
    error = f", max error {_error(max_abs_error)}" if max_abs_error is not None else ""
    return f"SQNR {_decibel(sqnr_db)}{error} against the eager model"


def _error(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _casts(casts: Casts) -> str:
    """`casts: 4 that move 1.2 MB in one pass through the graph; op by op it would be 107 and 93 MB; 0 before`.

    Not "per call": the body of a loop counts once, and both sides of a branch do.
    """
    after, one_by_one, before = casts.after, casts.one_by_one, casts.before
    moves = "moves" if after.count == 1 else "move"
    return (
        f"casts: {after.count} that {moves} {_bytes(after.bytes)} in one pass through the graph; "
        f"op by op it would be {one_by_one.count} and {_bytes(one_by_one.bytes)}; {before.count} before"
    )


def _bytes(count: int) -> str:
    """Decimal units: `950 B`, `1.2 MB`, `93 MB`.

    >>> [_bytes(n) for n in (0, 950, 1234, 93_400_000, 999_999)]
    ['0 B', '950 B', '1.2 kB', '93 MB', '1.0 MB']
    """
    if count < 1000:
        return f"{count} B"
    size = float(count)
    units = iter(("kB", "MB", "GB", "TB", "PB", "EB"))
    unit = "B"
    while size >= 999.5:
        size, unit = size / 1000, next(units)
    return f"{size:.1f} {unit}" if size < 9.95 else f"{size:.0f} {unit}"


def _option(value: object) -> str:
    return spelled_option(value).removeprefix("torch.")


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _option(value)
