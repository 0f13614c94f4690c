"""The report that `optimize` gives: the data, printed as a table."""

from __future__ import annotations

from io import StringIO

from rich.console import Console, ConsoleOptions, RenderResult

from passes.report import rendering
from passes.report.data import ReportData


class Report(ReportData):
    """The whole run; `print(report)` and rich print it as a table, `to_dict()` gives it as plain data."""

    def __str__(self) -> str:
        """The report as text, 80 columns wide, without colour."""
        console = Console(file=StringIO(), width=80, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(self)
        assert isinstance(console.file, StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from rendering.whole(self)
