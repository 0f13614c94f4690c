"""The commands, each a function that typer calls. What needs torch is imported when a command runs."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from passes.cli.arguments import TUNING_RECORDS_HELP, Calibration, Engine, Frontend, Inputs, PassNames, Source
from passes.cli.terminal import check_writable, make_folder_of, print_fact, progress_line
from passes.errors import InputError, OptionError, UnknownPassError

if TYPE_CHECKING:
    from ir_tools.ir import Program
    from passes.driver.compiled_model import OptimizedModel
    from passes.report.report import Report


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
    tuning_records: Annotated[Path | None, typer.Option(help=TUNING_RECORDS_HELP)] = None,
    choices: Annotated[Path | None, typer.Option(hidden=True, help="The old name of --tuning-records.")] = None,
    calibration: Calibration = None,
    bench: Annotated[bool, typer.Option(help="Time the eager and the optimised model side by side.")] = True,
) -> None:
    """Optimise a model, report what was done, and write the result."""
    from passes.cli.example_inputs import calibration_calls
    from passes.driver.inputs import under_either_name
    from passes.driver.optimize import optimize as run

    records = under_either_name("--tuning-records", tuning_records, "--choices", choices)
    if out is not None:
        check_writable(out)
    calls = calibration_calls(calibration) if calibration is not None else None
    console = Console()
    model, inputs = _read(source, input, console)
    options = _options(passes, frontend=frontend, engine=engine, tolerance=tolerance, verify=verify, dump_dir=dump_dir)
    options["calibration_data"] = calls
    replays = records is not None and records.exists()
    if records is not None and not replays:
        check_writable(records)
    options["tuning_records"] = records if replays else None
    with progress_line() as progress:
        result = run(model, example_inputs=inputs, progress=progress, dry_run=dry_run, **options)
    if records is not None and not replays:
        _save_tuning_records(result if dry_run else result.report, records, console)
    if dry_run:
        _explain(result, console)
        return
    console.print(result.report)
    if out is not None:
        _save(result, out)
    if bench:
        _print_latency(model, result, inputs, console)
    if out is not None:
        print_fact(console, "saved", str(out))
    _say_where_dumps_are(result.dumps, console)


def explain(
    source: Source,
    input: Inputs = None,
    passes: PassNames = None,
    at: Annotated[str | None, typer.Option(help="A module path or op: say how near each rule came there.")] = None,
    calibration: Calibration = None,
    frontend: Frontend = "auto",
    engine: Engine = "auto",
) -> None:
    """Say which passes would fire on a model, which would not, and why; emit nothing."""
    from passes.cli.example_inputs import calibration_calls
    from passes.driver.optimize import optimize as run

    calls = calibration_calls(calibration) if calibration is not None else None
    console = Console()
    model, inputs = _read(source, input, console)
    options = _options(passes, frontend=frontend, engine=engine, calibration_data=calls)
    with progress_line() as progress:
        report = run(model, example_inputs=inputs, progress=progress, dry_run=True, explain_at=at, **options)
    _explain(report, console)


def list_passes() -> None:
    """List the passes, what each may do to numbers, their options, and the groups."""
    from ir_tools.rewrite.numeric_effects import in_words
    from passes.driver.catalogue import CATALOGUE, GROUPS

    console = Console()
    console.print(
        "Behind the name of a pass stands what it may do to numbers. Options are written behind the name, as in "
        "cast_half:level=O1:keep_float=head+softmax; of several values the first is the default."
    )
    for name, entry in CATALOGUE.items():
        console.print(Text.assemble((f"\n{name}", "bold"), (f"  {in_words(entry.effects)}", "cyan")))
        console.print(Padding(Text(entry.summary), (0, 0, 0, 2), expand=False))
        for syntax in entry.option_syntax.values():
            console.print(Text(f"  :{syntax}", style="cyan"), soft_wrap=True)
        # Equations are as wide as the code they come from: on a narrow terminal they wrap, they are never cut.
        console.print(Text(textwrap.indent(entry.equation, " " * 6), style="dim"), soft_wrap=True)
    console.print(Text("\nGroups", style="bold"))
    for name, members in GROUPS.items():
        console.print(Text(f"{name} = {', '.join(members)}"))


def draw(
    source: Source,
    out: Annotated[Path, typer.Option("--out", "-o", help="The drawing to write: a .svg or a .dot file.")],
    input: Inputs = None,
    passes: PassNames = None,
    frontend: Frontend = "auto",
    engine: Engine = "auto",
) -> None:
    """Draw the graph of a model: as captured, or with --passes as these passes and the lowering leave it."""
    from ir_tools.files import write_atomically
    from ir_tools.visualize import draw_svg, to_dot

    if out.suffix not in (".svg", ".dot"):
        raise OptionError(f"--out must end in .svg or .dot, got {str(out)!r}")
    check_writable(out)
    console = Console()
    model, inputs = _read(source, input, console)
    with progress_line() as progress:
        progress("capturing")
        program = _program(model, inputs, _options(passes, frontend=frontend, engine=engine))
    text = to_dot(program, title=f"{source}: {len(program)} ops")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".svg":
        with progress_line() as progress:
            progress("drawing")
            reason = draw_svg(text, out)
        if reason is None:
            print_fact(console, "drawn", str(out))
            return
        print_fact(console, "no SVG", reason)
        out = out.with_suffix(".dot")
    write_atomically(out, text.encode())
    print_fact(console, "drawn", str(out))


def verify(file: Annotated[Path, typer.Argument(help="A file that `optimize` wrote.")]) -> None:
    """Check that a saved model still gives the outputs stored with it; exit code 2 when it does not."""
    from passes.driver.compiled_model import load

    loaded = load(file)
    manifest = loaded.manifest
    console = Console()
    print_fact(console, "file", str(file))
    print_fact(console, "versions", f"torch-passes {manifest['torch_passes']}, torch {manifest['torch']}")
    print_fact(console, "front end", manifest["frontend"])
    print_fact(console, "engine", manifest["engine"])
    if loaded.needs:
        print_fact(console, "needs", loaded.needs)
    print_fact(console, "passes", ", ".join(manifest["passes"]))
    inputs = (f"{i['name']}: {i['dtype']}{i['shape']}" for i in manifest["inputs"])
    print_fact(console, "inputs", "; ".join(inputs))
    print_fact(console, "numbers", _numbers(manifest))
    console.print(Text("verified: the file gives its golden outputs on this machine", style="bold green"))


COMMANDS: dict[str, Callable[..., None]] = {
    "optimize": optimize,
    "explain": explain,
    "passes": list_passes,
    "draw": draw,
    "verify": verify,
}


# -- shared by the commands -------------------------------------------------------------------------------------------


def _read(source: str, input: list[str] | None, console: Console) -> tuple[Any, tuple[Any, ...]]:
    """The model and its example inputs: from --input, or for a file that `optimize` wrote the golden ones in it."""
    from ir_tools.emit import package
    from passes.cli.example_inputs import example_inputs
    from passes.cli.sources import load_source

    inputs = example_inputs(input) if input else None
    notes: list[str] = []
    with progress_line() as progress:
        progress("loading the model")
        model = load_source(source, notes.append)
        if isinstance(model, str):
            path = model
            model, manifest = package.read_torchscript(path)
            if inputs is None and manifest is not None:
                inputs = tuple(package.load(path)[2])
    for line in notes:
        print_fact(console, "model", line)
    if inputs is None:
        raise InputError(
            "no --input was given; sizes and dtypes are taken from it, and numbers are compared on it. "
            "Give one per tensor argument, for example --input 1x3x224x224"
        )
    return model, inputs


def _options(passes: str | None, **options: Any) -> dict[str, Any]:
    if passes is not None:
        names = [name.strip() for name in passes.split(",") if name.strip()]
        _check_commas(names)
        options["passes"] = names
    return options


def _check_commas(names: Sequence[str]) -> None:
    """Raise `UnknownPassError` for what is no pass and stands behind the comma of an option that takes several names."""
    from passes.driver.catalogue import CATALOGUE, GROUPS

    for before, name in pairwise(names):
        pass_, option = CATALOGUE.get(before.split(":")[0]), before.split(":")[-1]
        takes_several = pass_ is not None and "+" in pass_.option_syntax.get(option.partition("=")[0], "")
        if takes_several and name.split(":")[0] not in {*CATALOGUE, *GROUPS}:
            raise UnknownPassError(
                f"there is no pass {name!r}; commas part passes, and names in an option are joined by '+': {option}+{name}"
            )


def _explain(report: Report, console: Console) -> None:
    from passes.report import rendering

    console.print(*rendering.explanation(report), sep="\n")


def _program(model: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Program:
    """The graph to draw: as captured, or as the passes asked for and the lowering leave it."""
    if "passes" in options:
        from passes.driver.optimize import optimize as run

        return run(model, example_inputs=inputs, verify="off", **options).program
    from ir_tools.frontends.capture import capture
    from ir_tools.frontends.source import prepare

    return capture(prepare(model, [(inputs, {})]), options["frontend"]).program


def _save(result: OptimizedModel, out: Path) -> None:
    make_folder_of(out)
    result.save(out)


def _save_tuning_records(report: Report, path: Path, console: Console) -> None:
    if report.tuning_records is None:
        print_fact(console, "tuning", f"nothing was measured: {path} is not written")
        return
    make_folder_of(path)
    report.tuning_records.save(path)
    print_fact(console, "tuning", f"records written to {path}")


def _print_latency(model: Any, result: OptimizedModel, inputs: tuple[Any, ...], console: Console) -> None:
    from passes.tune.timing import compare_latency

    with progress_line(still=True) as progress:
        progress("timing the eager and the optimised model in turn")
        comparison = compare_latency(model, result, inputs)
    medians = f"medians of {comparison.rounds} interleaved rounds"
    print_fact(console, "latency", f"eager → optimised: {comparison} ({medians})")


def _numbers(manifest: dict[str, Any]) -> str:
    if not manifest["verified"]:
        return "not verified when it was written"
    sqnr = manifest["sqnr_db"]
    return f"SQNR {sqnr if isinstance(sqnr, str) else f'{sqnr:.1f}'} dB against the eager model when it was written"


def _say_where_dumps_are(dumps: list[Any], console: Console) -> None:
    if not dumps:
        return
    paths = [Path(p) for p in dumps]
    kinds = {suffix: [p for p in paths if p.suffix == suffix] for suffix in (".dot", ".svg")}
    counts = ", ".join(f"{len(found)} {suffix[1:].upper()}" for suffix, found in kinds.items() if found)
    last = (kinds[".svg"] or kinds[".dot"] or paths)[-1]
    print_fact(console, "graphs", f"{paths[0].parent}: {counts} files, one per pass; the last is {last}")
