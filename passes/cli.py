"""The command line: `torch-passes optimize | explain | passes | draw | verify`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from passes.errors import ModelFileError, PassesError
from passes.sources import FORMS, example_inputs, load_source

FAILED = 2
"""Exit code of every error that torch-passes raises on purpose."""

INPUTS_HELP = (
    "An example input, once per tensor argument: 1x3x224x224 (random floats), 8x128:bfloat16 (another dtype), "
    "1x128:int64 (random integers from 0 to 99), 1x128:int64:30522 (from 0 to 30521), scalar:int64 (rank 0)."
)
SOURCE_HELP = f"The model: {FORMS}."


class _Commands(TyperGroup):
    """Commands whose expected errors are one message on stderr and exit code 2; any other error keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PassesError as error:
            Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(str(error)))
            raise typer.Exit(FAILED) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Optimise PyTorch models for inference: rewrite the graph, check the numbers, write TorchScript.",
)

Source = Annotated[str, typer.Argument(help=SOURCE_HELP)]
Inputs = Annotated[list[str] | None, typer.Option("--input", "-i", help=INPUTS_HELP, metavar="SHAPE[:DTYPE[:BELOW]]")]
PassNames = Annotated[
    str | None,
    typer.Option(
        "--passes",
        "-p",
        help="Passes and groups, comma-separated, with options after colons: fuse_conv_bn_relu,cast_half:level=O1. "
        "Default: the pipeline that changes no precision. `torch-passes passes` lists them.",
        metavar="NAME[:OPTION=VALUE]…,…",
    ),
]
Frontend = Annotated[str, typer.Option(help="How to capture: auto, export, trace, script or fx.")]
Engine = Annotated[str, typer.Option(help="What to emit: auto, aten, onednn_ops or onednn_graph.")]


@app.command()
def optimize(
    source: Source,
    input: Inputs = None,
    passes: PassNames = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write the TorchScript file.")] = None,
    dump_dir: Annotated[Path | None, typer.Option(help="Where to write the graph after each pass (DOT, SVG).")] = None,
    frontend: Frontend = "auto",
    engine: Engine = "auto",
    tolerance: Annotated[float | None, typer.Option(help="Least SQNR in dB that a pass may leave.")] = None,
    verify: Annotated[str, typer.Option(help="Compare numbers with the eager model: each, ends or off.")] = "each",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report what would be done.")] = False,
    bench: Annotated[bool, typer.Option(help="Time the eager and the optimised model side by side.")] = True,
) -> None:
    """Optimise a model, report what was done, and write the result."""
    from passes import optimize as run

    if out is not None:
        check_writable(out)
    console = Console()
    model, inputs = _read(source, input, console)
    options = _options(passes, frontend=frontend, engine=engine, tolerance=tolerance, verify=verify, dump_dir=dump_dir)
    with progress_line() as progress:
        result = run(model, example_inputs=inputs, progress=progress, dry_run=dry_run, **options)
    if dry_run:
        _explain(result, console)
        return
    console.print(result.report)
    if bench and inputs is not None:
        with progress_line() as progress:
            progress("timing the eager and the optimised model in turn")
            comparison = _compare(model, result, inputs)
        medians = f"medians of {comparison.rounds} interleaved rounds"
        _fact(console, "latency", f"eager → optimised: {comparison} ({medians})")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result.save(out)
        _fact(console, "saved", str(out))
    _say_where_dumps_are(result.dumps, console)


@app.command()
def explain(
    source: Source,
    input: Inputs = None,
    passes: PassNames = None,
    frontend: Frontend = "auto",
    engine: Engine = "auto",
) -> None:
    """Say which passes would fire on a model, which would not, and why; emit nothing."""
    from passes import optimize as run

    console = Console()
    model, inputs = _read(source, input, console)
    with progress_line() as progress:
        report = run(
            model,
            example_inputs=inputs,
            progress=progress,
            dry_run=True,
            **_options(passes, frontend=frontend, engine=engine, verify="each" if inputs is not None else "off"),
        )
    _explain(report, console)


@app.command("passes")
def list_passes() -> None:
    """List the passes, what each may do to numbers, their options, and the groups."""
    from passes.catalogue import CATALOGUE, GROUPS

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("pass", style="bold", no_wrap=True)
    table.add_column("what it does", overflow="fold", ratio=1)
    table.add_column("numbers", no_wrap=True)
    for name, entry in CATALOGUE.items():
        what = Text(entry.summary)
        if entry.equation:
            what += Text(f"\n{entry.equation}", style="cyan")
        if entry.options:
            what += Text("\noptions: " + ", ".join(f"{k}={v}" for k, v in entry.options.items()), style="dim")
        table.add_row(name, what, entry.declares)
    console = Console()
    console.print(table)
    for name, members in GROUPS.items():
        console.print(Text("\ngroup ") + Text(name, style="bold") + Text(f" = {', '.join(members)}"))


@app.command()
def draw(
    source: Annotated[str, typer.Argument(help=SOURCE_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The drawing: a .svg or a .dot file.")],
    input: Inputs = None,
    passes: PassNames = None,
    frontend: Frontend = "auto",
) -> None:
    """Draw the graph of a model: as captured, or after --passes."""
    raise NotImplementedError


@app.command()
def verify(file: Annotated[Path, typer.Argument(help="A file that `optimize` wrote.")]) -> None:
    """Run the golden inputs stored in a file and compare with the golden outputs."""
    raise NotImplementedError


def main() -> None:
    """Entry point of the command `torch-passes`."""
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    app(prog_name="torch-passes")


# -- shared by the commands -------------------------------------------------------------------------------------------


def _read(source: str, input: list[str] | None, console: Console) -> tuple[Any, tuple[Any, ...] | None]:
    """The model and example inputs (None when there is no --input)."""
    inputs = example_inputs(input) if input else None
    return load_source(source, tell=lambda line: _fact(console, "model", line)), inputs


def _options(passes: str | None, **options: Any) -> dict[str, Any]:
    if passes is not None:
        options["passes"] = [name.strip() for name in passes.split(",") if name.strip()]
    return options


def _fact(console: Console, name: str, text: str) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    grid.add_row(name, Text(text))
    console.print(grid)


def _explain(report: Any, console: Console) -> None:
    report.dry_run = True
    console.print(report.header())
    console.print(*report.rewritten(), *report.refused(limit=10_000), *report.noted(), *report.verdict(), sep="\n")


def _compare(model: Any, optimized: Any, inputs: tuple[Any, ...]) -> Any:
    from passes.timing import compare_latency

    return compare_latency(model, optimized, inputs)


def _say_where_dumps_are(dumps: list[Any], console: Console) -> None:
    if not dumps:
        return
    paths = [Path(p) for p in dumps]
    kinds = {suffix: [p for p in paths if p.suffix == suffix] for suffix in (".dot", ".svg")}
    counts = ", ".join(f"{len(found)} {suffix[1:].upper()}" for suffix, found in kinds.items() if found)
    last = (kinds[".svg"] or kinds[".dot"] or paths)[-1]
    _fact(console, "graphs", f"{paths[0].parent}: {counts} files, one per pass; the last is {last}")


def check_writable(path: Path) -> None:
    """Raise `ModelFileError` when a file cannot be written at `path`: better before the work than after it."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory; expected the name of a file to write")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ModelFileError(f"{path} cannot be written: {folder} is not a directory")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ModelFileError(f"{path} cannot be written: no permission")


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done now, with a spinner; on anything but a terminal it shows nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda description: None
        return
    with console.status("starting") as status:
        yield lambda description: status.update(Text(description))
