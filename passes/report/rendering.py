"""A report as text: its parts, each something that rich prints, in the order in which they are printed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ir_tools.errors import first_line
from ir_tools.rewrite.nearest import NearMiss
from ir_tools.rewrite.rewrite_log import Refusal, Rewrite
from passes.report.data import ReportData
from passes.report.formatting import agreement, casts_line, decibel, error, option, seconds

REASONS_SHOWN = 12
MODULES_SHOWN = 3


def whole(report: ReportData) -> Iterable[Table | Text | Padding]:
    """All that a printed report holds."""
    yield header(report)
    yield Text("")
    yield table(report)
    yield from outcome(report)
    yield from refused(report)
    yield from missed(report)
    yield from noted(report)


def explanation(report: ReportData) -> Iterable[Table | Text | Padding]:
    """What `explain` prints: every rewrite, every refusal, the passes that found nothing; the outcome last."""
    yield header(report)
    yield Text("")
    yield table(report)
    yield from rewritten(report)
    yield from refused(report, limit=10_000, expected=True)
    yield from missed(report)
    yield from idle(report)
    yield from noted(report)
    yield from outcome(report)


def header(report: ReportData) -> Table:
    """Front end and why, inputs, engine, workloads measured: a two-column grid."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    reason = f" ({report.frontend_reason})" if report.frontend_reason else ""
    grid.add_row("front end", Text(f"{report.frontend or '-'}{reason}"))
    for name, why in report.frontend_refusals.items():
        grid.add_row("", Text(f"not {name}: {first_line(why)}", style="yellow"))
    captured = f"{report.captured_nodes} ops"
    if report.capture_seconds:
        captured += f" in {seconds(report.capture_seconds)} s"
    if report.captured_sqnr_db is not None:
        captured += f", {agreement(report.captured_sqnr_db, report.captured_max_abs_error)}"
    grid.add_row("captured", Text(captured))
    if report.inputs:
        grid.add_row("inputs", Text("; ".join(report.inputs)))
    if report.engine:
        grid.add_row("engine", Text(report.engine))
    if report.tuning_records is not None and report.tuning_records.requested:
        grid.add_row("tuning", Text(str(report.tuning_records)))
    return grid


def table(report: ReportData) -> Table:
    """One row per pass. Expected refusals are not counted."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("pass", overflow="fold")
    for heading in ("rewrites", "refused", "nodes", "max error", "SQNR dB", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for step in report.steps:
        refusals = len([r for r in step.refusals if not r.expected])
        nodes = f"{step.nodes_before}→{step.nodes_after}" if step.rewrote else str(step.nodes_after)
        details = [*(f"{k}={option(v)}" for k, v in step.options.items()), *(["reverted"] if step.reverted else [])]
        table.add_row(
            Text("\n  ".join([step.name, *details])),
            Text(str(len(step.rewrites)), style="bold green" if step.rewrites else "dim"),
            Text(str(refusals), style="yellow" if refusals else "dim"),
            nodes,
            error(step.max_abs_error),
            decibel(step.sqnr_db, unit=""),
            seconds(step.seconds),
            style="" if step.changed else "dim",
        )
    return table


def outcome(report: ReportData) -> Iterable[Text]:
    """Whether anything changed, and whether the numbers were checked."""
    yield Text("")
    if not report.changed:
        what = "nothing would change" if report.dry_run else "nothing changed"
        yield Text(f"{what}: no pass found anything to rewrite", style="bold yellow")
    yield from casts(report)
    if report.dry_run:
        yield Text("dry run: nothing was emitted", style="bold")
        return
    if report.verified:
        numbers = f": {agreement(report.sqnr_db, report.max_abs_error)}" if report.sqnr_db is not None else ""
        yield Text(f"verified{numbers}", style="bold green")
    else:
        yield Text("not verified: no numbers were compared with the eager model", style="bold yellow")
    if report.speed is not None:
        known = report.speed.decision != "unknown"
        yield Text(str(report.speed), style="bold yellow" if report.speed.slower or not known else "bold green")
    if report.seconds:
        emitted = f", of which emission {seconds(report.emit_seconds)} s" if report.emit_seconds else ""
        timed = f" and the speed comparison {seconds(report.speed.seconds)} s" if emitted and report.speed is not None else ""
        yield Text(f"took {seconds(report.seconds)} s{emitted}{timed}")
    if report.ops_left:
        most = sorted(report.ops_left.items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{name} ×{count}" for name, count in most[:8])
        yield Text(f"ops: {shown}" + (f", {len(most) - 8} other kinds" if len(most) > 8 else ""))


def casts(report: ReportData) -> Iterable[Text]:
    """What ranges were observed on, and the count and bytes of casts: a line each for every pass that has them."""
    for step in report.steps:
        if step.ranges:
            yield Text(f"{step.name}: ranges observed on {step.ranges}")
        if step.casts is not None and any(t.count for t in (step.casts.before, step.casts.one_by_one, step.casts.after)):
            undone = " (reverted)" if step.reverted else ""
            yield Text(f"{step.name}: {casts_line(step.casts)}{undone}")


def refused(report: ReportData, limit: int = REASONS_SHOWN, expected: bool = False) -> Iterable[Text | Padding]:
    """Refusals grouped by pass and reason, the most frequent first; the expected ones only with `expected`."""
    groups: dict[tuple[str, str], list[Refusal]] = {}
    for step in report.steps:
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
        yield Padding(Text(locations([r.module for r in refusals])), (0, 0, 0, 4), expand=False)
    if len(ordered) > limit:
        more = sum(len(refusals) for _, refusals in ordered[limit:])
        yield Padding(Text(f"… {len(ordered) - limit} more reasons, {more} sites"), (0, 0, 0, 2), expand=False)


def rewritten(report: ReportData) -> Iterable[Text | Padding]:
    """Rewrites grouped by pass and rule. Not part of the printed report; the CLI's `explain` shows it."""
    groups: dict[tuple[str, str], list[Rewrite]] = {}
    for step in report.steps:
        for rewrite in step.rewrites:
            groups.setdefault((step.name, rewrite.rule), []).append(rewrite)
    if not groups:
        return
    yield Text("\nwould fire" if report.dry_run else "\nfired", style="bold")
    for (name, rule), rewrites in groups.items():
        label = name if rule in ("", name) else f"{name}: {rule}"
        yield Padding(Text(f"{label} ×{len(rewrites)}", style="green"), (0, 0, 0, 2), expand=False)
        yield Padding(Text(locations([r.module for r in rewrites])), (0, 0, 0, 4), expand=False)


def missed(report: ReportData) -> Iterable[Text | Padding]:
    """How near each rule came at the location asked for (`explain_at`); ops with one and the same sentence are grouped."""
    groups: dict[tuple[str, str, str], list[NearMiss]] = {}
    for step in report.steps:
        for miss in step.near_misses:
            groups.setdefault((step.name, miss.rule, miss.sentence), []).append(miss)
    if groups:
        yield Text("\nnearest misses", style="bold")
    for (name, rule, sentence), misses in groups.items():
        yield Padding(Text(f"{name}: {rule}", style="yellow"), (0, 0, 0, 2), expand=False)
        yield Padding(Text(f"{sentence.rstrip('.')} ({locations([m.module for m in misses])})"), (0, 0, 0, 4), expand=False)


def idle(report: ReportData) -> Iterable[Text | Padding]:
    """Passes that matched nothing, not even a site to refuse. Shown by the CLI's `explain`."""
    names = [step.name for step in report.steps if not step.rewrote and not step.refusals]
    if names:
        yield Text("\nfound nothing to do", style="bold")
        yield Padding(Text(", ".join(names)), (0, 0, 0, 2), expand=False)


def noted(report: ReportData) -> Iterable[Text | Padding]:
    if report.notes:
        yield Text("\nnotes", style="bold")
    for note in report.notes:
        yield Padding(Text(note), (0, 0, 0, 2), expand=False)


def locations(modules: Sequence[str], limit: int = MODULES_SHOWN) -> str:
    """`layer1.0.bn1, layer1.0.bn2, layer1.1.bn1, … 20 more`: each module once, the first few."""
    distinct = list(dict.fromkeys(modules))
    more = len(distinct) - limit
    return ", ".join(distinct[:limit]) + (f", … {more} more" if more > 0 else "")
