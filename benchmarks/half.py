"""Half precision, side by side: what torch offers, and our levels; time, noise, casts, in one run.

    python -m benchmarks.half --out half.md                    # the seed cases; some minutes each, for torch.compile
    python -m benchmarks.half --model resnet18 --model bert_base --seconds 5 --no-compile
    python -m benchmarks.half --zoo-sample                     # noise and casts of the tests' zoo models, no times

    mode                               what it is
    eager float32                      the user's model as it is; the reference of every ratio and of every SQNR
    eager float32, channels-last       the same in the other layout, for models of images
    eager autocast                     the user's model, called under `torch.autocast("cpu", dtype)`
    trace under autocast               traced under autocast, then frozen (which folds casts of weights, and batch norms);
                                       where freezing fails, the trace alone
    model.bfloat16() or model.half()   a copy of the model; inputs are cast in the call, outputs to float32
    compile under autocast             `torch.compile(model)`, called under autocast
    compile under autocast, freezing   with inductor's freezing, which casts and packs the weights ahead of time
    O1, O2, O3                         `optimize(model, [*DEFAULT, "cast_half:level=...:dtype=..."])`, engine "auto"

Each of torch's half modes runs contiguous and channels-last, and the faster one is reported (changing the
input's layout is part of the call); freezing takes the layout that won without it. Autocast is entered anew in each call, as a
server does, so that eager autocast casts its weights in each. Every round calls each mode once (`passes.tune.timing`).

SQNR is 10 log10(signal / noise) against eager float32, in float64, both summed over four inputs; the worst output counts.
Casts are those between floating dtypes that are done in each call, as the graph is written: for the trace, in its graph before
freezing, with those of weights, and in brackets those of values that follow from an input, which freezing leaves.
A Program is held against both.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.half_models import SEED_CASES, Case, squared_error, zoo_sample
from ir_tools.ir import Program
from ir_tools.ir.regions import bodies, is_region
from ir_tools.ir.signature import result_tensors
from ir_tools.rewrite.cast import traffic
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.compiler import forget_compiled_code, freezing
from passes import DEFAULT, optimize
from passes.tune.timing import interleaved_seconds

EAGER, AUTOCAST, TRACE = "eager float32", "eager autocast", "trace under autocast"
COMPILE, FREEZING = "compile under autocast", "compile under autocast, freezing"
LEVELS = ("O1", "O2", "O3")
CASTS = ("aten::to", "aten::_to_copy", "aten::_autocast_to_reduced_precision", "aten::_autocast_to_full_precision")
ALL_CASTS, CASTS_OF_ACTIVATIONS = "those of weights included", "those of values that follow from an input alone"
"""Which casts of the trace: all in its graph, or those that freezing leaves. A Program has cast its weights ahead of time."""
O1_MAY_LOSE_DB, O2_MAY_LOSE_DB = 1.0, 0.5

Callee = Callable[..., Any]


@dataclass
class Mode:
    """A model compiled or wrapped in one mode: the callable and the casts in its graph, or the `error` that prevented it."""

    call: Callee | None = None
    casts: int | None = None
    casts_of_activations: int | None = None
    verified: bool = False
    remark: str = ""
    error: str = ""


@dataclass
class Row:
    """What was measured of one mode. SQNR in dB; None is what was not measured."""

    mode: Mode
    seconds: float | None = None
    sqnr_db: float | None = None
    finite: bool | None = None
    loss: float | None = None


@dataclass
class Result:
    """The table of one model, and how many rounds it was timed for."""

    title: str
    rows: dict[str, Row] = field(default_factory=dict)
    rounds: int = 0

    def times_faster(self, mode: str, than: str) -> float | None:
        """The ratio of the median times, None where one is missing."""
        theirs, ours = (self.rows[name].seconds if name in self.rows else None for name in (than, mode))
        return theirs / ours if theirs and ours else None


# -- torch's modes -------------------------------------------------------------------------------------------------------


def under_autocast(model: Callee, half: torch.dtype) -> Callee:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", half):
            return model(*args, **kwargs)

    return call


def eager_autocast(case: Case, model: nn.Module, half: torch.dtype) -> Mode:
    return Mode(under_autocast(model, half))


def cast_model(case: Case, model: nn.Module, half: torch.dtype) -> Mode:
    """The whole model in half, as `model.bfloat16()` and `model.half()` give it."""
    model = copy.deepcopy(model).to(half)

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = converted((args, kwargs), lambda t: t.to(half) if t.is_floating_point() else t)
        return converted(result_tensors(model(*args, **kwargs)), lambda t: t.float() if t.is_floating_point() else t)

    return Mode(call)


class OfTensors(nn.Module):
    """The model as a function from tensors to a tuple of tensors, which is what `torch.jit.trace` takes."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        return tuple(result_tensors(self.model(*args, **kwargs)))


def trace(case: Case, model: nn.Module, half: torch.dtype) -> Mode:
    args, kwargs = case.calls[0]
    with torch.autocast("cpu", half, cache_enabled=False):  # a cached cast would be a constant of the trace
        traced = torch.jit.trace(OfTensors(model, args, kwargs).eval(), tensors_of(args, kwargs), check_trace=False)
    casts, of_activations = casts_of_trace(traced)
    runs, remark = traced, ""
    try:
        runs = torch.jit.freeze(traced)
        runs(*tensors_of(args, kwargs))
    except RuntimeError as error:
        runs, remark = traced, f"not frozen: {first_line(error)}"
    return Mode(lambda *args, **kwargs: runs(*tensors_of(args, kwargs)), casts, of_activations, remark=remark)


def casts_of_trace(traced: torch.jit.ScriptModule) -> tuple[int, int]:
    """Casts between floating dtypes in each call of a trace that is not frozen; and those of values that follow from an input.

    The other ones are of weights, or of what is computed from weights alone (the standardised weights of BiT).
    """

    def of_module(value: Any) -> Any:
        node = value.node()
        return getattr(of_module(node.input()), node.s("name")) if node.kind() == "prim::GetAttr" else traced

    _, *inputs = traced.inlined_graph.inputs()  # the first one is the module
    activations = {value.debugName() for value in inputs}
    casts = of_activations = 0
    for node in traced.inlined_graph.nodes():
        follows = any(value.debugName() in activations for value in node.inputs())
        if follows:
            activations.update(value.debugName() for value in node.outputs())
        if node.kind() not in CASTS:
            continue
        operand = next(node.inputs())
        before = of_module(operand).dtype if operand.node().kind() == "prim::GetAttr" else tensor_dtype(operand)
        after = tensor_dtype(node.output())
        if before and after and before.is_floating_point and after.is_floating_point and before is not after:
            casts += 1
            of_activations += follows
    return casts, of_activations


def tensor_dtype(value: Any) -> torch.dtype | None:
    """The dtype of a value in a trace's graph; None where the trace knows none, as for a weight that is read."""
    return value.type().dtype() if isinstance(value.type(), torch.TensorType) else None


def compiled(case: Case, model: nn.Module, half: torch.dtype) -> Mode:
    call = under_autocast(torch.compile(model), half)
    args, kwargs = case.calls[0]
    call(*args, **kwargs)
    return Mode(call)


def compiled_and_frozen(case: Case, model: nn.Module, half: torch.dtype) -> Mode:
    # As an option too: the cache of compiled code distinguishes backends by their options, not by this switch.
    call = under_autocast(torch.compile(copy.deepcopy(model), options={"freezing": True}), half)
    args, kwargs = case.calls[0]
    with freezing():
        call(*args, **kwargs)
    return Mode(call)


Build = Callable[[Case, nn.Module, torch.dtype], Mode]


def in_channels_last(build: Build, case: Case, half: torch.dtype) -> Mode:
    """The mode on a channels-last copy of the model; images are given that layout in the call."""
    model = copy.deepcopy(case.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def convert(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t

    mode = build(Case(case.title, model, converted(case.calls, convert)), model, half)
    inner = mode.call
    assert inner is not None

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = converted((args, kwargs), convert)
        return inner(*args, **kwargs)

    mode.call, mode.remark = call, "channels-last" + (f", {mode.remark}" if mode.remark else "")
    return mode


def in_faster_layout(build: Build, case: Case, half: torch.dtype) -> Mode:
    """The mode contiguous or channels-last, whichever takes less time in half a second, or five calls, of each."""
    modes = {"contiguous": build(case, case.model, half), "channels-last": in_channels_last(build, case, half)}
    args, kwargs = case.calls[0]
    calls = {name: lambda call=mode.call: call(*args, **kwargs) for name, mode in modes.items()}
    times = interleaved_seconds(calls, seconds=1.0, least_rounds=5)
    return modes[min(times, key=lambda name: statistics.median(times[name]))]


def torchs_modes(case: Case, half: torch.dtype, with_times: bool, with_compile: bool) -> dict[str, Mode]:
    """The modes of torch, by name. Without times there is no faster layout to find: all are contiguous."""
    casting = "model.bfloat16()" if half is torch.bfloat16 else "model.half()"
    builds: dict[str, Build] = {AUTOCAST: eager_autocast, TRACE: trace, casting: cast_model}
    if with_compile:
        builds |= {COMPILE: compiled, FREEZING: compiled_and_frozen}
    modes = {EAGER: Mode(case.model)}
    choose = with_times and case.takes_images
    if choose:
        modes[f"{EAGER}, channels-last"] = in_channels_last(lambda case, model, half: Mode(model), case, half)
    for name, build in builds.items():
        try:
            if choose and name == FREEZING:  # a third compilation; a fourth would only find the faster layout again
                last = modes[COMPILE].remark.startswith("channels-last")
                modes[name] = in_channels_last(build, case, half) if last else build(case, case.model, half)
            else:
                modes[name] = in_faster_layout(build, case, half) if choose else build(case, case.model, half)
        except Exception as error:  # a peer may raise any error; the table shows it
            modes[name] = Mode(error=f"{type(error).__name__}: {first_line(error)}")
    return modes


# -- ours -----------------------------------------------------------------------------------------------------------------


def our_mode(case: Case, level: str, dtype: str) -> Mode:
    args, kwargs = case.calls[0]
    passes = [*DEFAULT, f"cast_half:level={level}:dtype={dtype}"]
    try:
        fast = optimize(case.model, passes, example_inputs=args or None, example_kwargs=kwargs)
    except Exception as error:  # numbers out of tolerance, above all
        return Mode(error=f"{type(error).__name__}: {first_line(error)}")
    casts = casts_of_program(fast.program)
    return Mode(fast, casts, casts, verified=bool(fast.manifest["verified"]))


def casts_of_program(program: Program) -> int:
    """Nodes that cast one floating dtype to another, in the bodies of branches and loops too."""
    inner = [program.of_body(body) for node in program.all_calls if is_region(node) for body in bodies(node)]
    return sum(traffic(block).count for block in (program, *inner))


# -- measuring ------------------------------------------------------------------------------------------------------------


def converted(values: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """`values` with every tensor in it converted."""
    return pytree.tree_map_only(Tensor, convert, values)


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:160]


def floating_outputs(result: Any) -> list[Tensor]:
    return [t.double() for t in result_tensors(result) if t.is_floating_point()]


def measure_numbers(case: Case, row: Row, references: Sequence[Sequence[Tensor]]) -> None:
    """Enter SQNR, finiteness and loss. `references` are the floating outputs of each call in float32."""
    assert row.mode.call is not None
    signal, noise = ([0.0] * len(references[0]) for _ in range(2))
    row.finite = True
    for (args, kwargs), expected in zip(case.calls, references, strict=True):
        values = floating_outputs(row.mode.call(*args, **kwargs))
        for i, (value, reference) in enumerate(zip(values, expected, strict=True)):
            row.finite &= bool(value[reference.isfinite()].isfinite().all())
            signal[i] += reference.square().sum().item()
            noise[i] += (reference - value).square().sum().item()
        if case.target is not None:
            row.loss = squared_error(values[0], case.target).item()
    row.sqnr_db = min(in_decibel(s, n) for s, n in zip(signal, noise))


def in_decibel(signal: float, noise: float) -> float:
    """SQNR from the two energies; without noise it is infinite, with noise that is NaN or infinite it is minus that."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def measure(case: Case, modes: dict[str, Mode], seconds: float | None) -> Result:
    """Run every mode; without `seconds` no times are taken."""
    result = Result(case.title, {name: Row(mode) for name, mode in modes.items()})
    references = [floating_outputs(case.model(*args, **kwargs)) for args, kwargs in case.calls]
    for row in result.rows.values():
        try:
            if row.mode.call is not None:
                measure_numbers(case, row, references)
        except Exception as error:  # of a peer that was traced or compiled, and does not run
            row.mode = Mode(error=f"{type(error).__name__}: {first_line(error)}")
    if seconds is not None:
        args, kwargs = case.calls[0]
        running = {name: row.mode.call for name, row in result.rows.items() if row.mode.call is not None}
        calls = {name: lambda call=call: call(*args, **kwargs) for name, call in running.items()}
        for name, times in interleaved_seconds(calls, seconds=seconds, least_rounds=9).items():
            result.rows[name].seconds = statistics.median(times)
            result.rounds = len(times)
    return result


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without gradients, and without the warnings of tracers and compilers about models that are not ours."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- what was promised ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A promise about one model; `met` is None where the figures for it are missing."""

    text: str
    met: bool | None
    figures: str

    def __str__(self) -> str:
        return f"{'no figures' if self.met is None else 'met' if self.met else 'NOT MET'}: {self.text} ({self.figures})"


def claims(result: Result) -> list[Claim]:
    rows = result.rows
    casting = next(name for name in rows if name.startswith("model."))
    found = []
    for level, peer, may_lose in (("O1", AUTOCAST, O1_MAY_LOSE_DB), ("O2", casting, O2_MAY_LOSE_DB)):
        ours, other, traced = rows[level], rows[peer], rows[TRACE]
        state = ours.mode.error or ("finite" if ours.finite else "not finite")
        state += "" if ours.mode.error else ", verified" if ours.mode.verified else ", not verified"
        found.append(Claim(f"{level} is finite and verified", bool(ours.finite and ours.mode.verified), state))
        known = ours.sqnr_db is not None and other.sqnr_db is not None
        met = (ours.sqnr_db >= other.sqnr_db - may_lose or not other.finite) if known else None  # type: ignore[operator]
        text = f"SQNR of {level} is within {may_lose:g} dB of {peer}, or better"
        found.append(Claim(text, met, f"{decibel(ours.sqnr_db)} and {decibel(other.sqnr_db)} dB"))
        for theirs, which in ((traced.mode.casts, ALL_CASTS), (traced.mode.casts_of_activations, CASTS_OF_ACTIVATIONS)):
            fewer = ours.mode.casts < theirs if ours.mode.casts is not None and theirs is not None else None
            text = f"{level} has fewer casts than {TRACE}, {which}"
            found.append(Claim(text, fewer, f"{count(ours.mode.casts)} and {count(theirs)}"))
    return found


def speed_lines(results: Sequence[Result]) -> list[str]:
    """Geometric means over the models that have both times."""
    lines = []
    for other in (EAGER, AUTOCAST, TRACE, COMPILE, FREEZING):
        ratios = [ratio for result in results if (ratio := result.times_faster("O2", other))]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            lines.append(f"O2 is {mean:.2f} times as fast as {other} (geometric mean of {len(ratios)} models)")
    return lines


# -- tables ---------------------------------------------------------------------------------------------------------------


def count(value: int | None) -> str:
    return "" if value is None else str(value)


def decibel(value: float | None) -> str:
    return "" if value is None else "equal" if value == math.inf else f"{value:.1f}"


def casts(mode: Mode) -> str:
    if mode.casts is None:
        return ""
    return str(mode.casts) if mode.casts == mode.casts_of_activations else f"{mode.casts} ({mode.casts_of_activations})"


def columns(result: Result) -> dict[str, Callable[[str, Row], str]]:
    """What a table has for each mode, by heading; columns without figures are left out."""

    def times_faster(name: str, row: Row) -> str:
        ratio = result.times_faster(name, EAGER)
        return "" if ratio is None else f"{ratio:.2f}"

    every: dict[str, Callable[[str, Row], str]] = {
        "mode": lambda name, row: name,
        "median ms": lambda name, row: "" if row.seconds is None else f"{row.seconds * 1e3:.2f}",
        f"times faster than {EAGER}": times_faster,
        "SQNR dB": lambda name, row: decibel(row.sqnr_db),
        "loss": lambda name, row: "" if row.loss is None else f"{row.loss:.6f}",
        "casts": lambda name, row: casts(row.mode),
        "finite": lambda name, row: "" if row.finite is None else "yes" if row.finite else "NO",
        "remark": lambda name, row: row.mode.error or row.mode.remark,
    }
    return {head: cell for head, cell in every.items() if any(cell(name, row) for name, row in result.rows.items())}


def caption(result: Result) -> str:
    return result.title + (f", {result.rounds} interleaved rounds" if result.rounds else "")


def in_terminal(result: Result) -> Table:
    table = Table(title=caption(result))
    heads = columns(result)
    for head in heads:
        table.add_column(head, justify="left" if head in ("mode", "finite", "remark") else "right")
    for name, row in result.rows.items():
        table.add_row(*(cell(name, row) for cell in heads.values()))
    return table


def in_markdown(results: Sequence[Result], machine: str) -> str:
    parts = [f"{machine}\n"]
    for result in results:
        heads = columns(result)
        parts.append(f"## {caption(result)}\n")
        parts.append(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for name, row in result.rows.items():
            parts.append(f"| {' | '.join(cell(name, row).replace('|', chr(92) + '|') for cell in heads.values())} |")
        parts.append("\n" + "\n".join(f"- {claim}" for claim in claims(result)) + "\n")
    parts.append("## All\n\n" + "\n".join(f"- {line}" for line in summary(results)) + "\n")
    return "\n".join(parts)


def summary(results: Sequence[Result]) -> list[str]:
    """The means, and each promise over all models."""
    lines = speed_lines(results)
    by_text: dict[str, list[tuple[str, Claim]]] = {}
    for result in results:
        for claim in claims(result):
            by_text.setdefault(claim.text, []).append((result.title, claim))
    for text, made in by_text.items():
        missed = [f"{title}: {claim.figures}" for title, claim in made if not claim.met]
        lines.append(f"{text}: {len(made) - len(missed)} of {len(made)}" + (f"; not: {'; '.join(missed)}" if missed else ""))
    return lines


def this_machine(dtype: str) -> str:
    kernels = torch.backends.cpu.get_cpu_capability()
    has = "has" if getattr(torch.ops.mkldnn, f"_is_mkldnn_{SHORT[dtype]}_supported")() else "lacks"
    threads = torch.get_num_threads()
    return f"{dtype}, torch {torch.__version__}, {threads} threads, {kernels}; oneDNN {has} {dtype} here"


SHORT = {"bfloat16": "bf16", "float16": "fp16"}


def main(
    model: Annotated[list[str], typer.Option(help=f"one of {', '.join(SEED_CASES)}")] = [],  # noqa: B006
    dtype: Annotated[Literal["bfloat16", "float16"], typer.Option(help="the half dtype")] = "bfloat16",
    compile: Annotated[bool, typer.Option(help="torch.compile among the peers, a minute or more for each model")] = True,
    sqnr_only: Annotated[bool, typer.Option(help="no times, and no torch.compile")] = False,
    zoo: Annotated[bool, typer.Option("--zoo-sample", help="the tests' models of the zoo; no times")] = False,
    seconds: Annotated[float, typer.Option(help="seconds of timing for each model")] = 20.0,
    out: Annotated[Path | None, typer.Option(help="a file for the tables as Markdown, written anew after each model")] = None,
) -> None:
    """Print a table for each model, then what was promised and whether it holds."""
    console = Console()
    console.width = max(console.width, 140)
    half, with_times = getattr(torch, dtype), not (sqnr_only or zoo)
    known = zoo_sample() if zoo else SEED_CASES
    if unknown := [name for name in model if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)}; there are {', '.join(known)}")
    console.print(this_machine(dtype))
    results: list[Result] = []
    for name in model or known:
        with quiet():
            case = known[name]()
            modes = torchs_modes(case, half, with_times, compile and with_times)
            modes |= {level: our_mode(case, level, dtype) for level in LEVELS}
            result = measure(case, modes, seconds if with_times else None)
        for row in result.rows.values():
            row.mode.call = None  # only figures are kept: each holds a copy of the weights
        del case, modes
        forget_compiled_code()
        gc.collect()
        results.append(result)
        console.print(in_terminal(result))
        for claim in claims(result):
            console.print(f"  {claim}", highlight=False)
        if out:
            out.write_text(in_markdown(results, this_machine(dtype)))
    console.print(*summary(results), sep="\n", highlight=False)


if __name__ == "__main__":
    typer.run(main)
