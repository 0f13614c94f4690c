"""Random models x random pipelines x front ends, for as long as wanted.

    python -m passes.testing.fuzz --examples 10000 --workers 2 --seed 0 --out fuzz

Each model goes through a random subset of the passes in a random order that the order rules allow. The invariants of every
pass are checked, and the numbers at the end against the eager model in float64. One model in ten is compiled instead:
`optimize`, with either engine, saved and loaded. At the end come tables of what fired, what was refused and why, and what
never was; `report.json` holds the same. Models on which something fails are minimized and written to `failures/` as tests to
paste.

The exit status is 1 when something failed, when no rule fired on more than `MOST_UNTOUCHED` of the models, or when a run of
`LONG` models left a rule or a requirement idle.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from hypothesis import strategies as st
from rich.console import Console

from ir_tools.torch_compat.compiler import forget_compiled_code
from passes.driver.catalogue import CATALOGUE, find_passes
from passes.testing.model_strategy import random_models
from passes.testing.pipeline_strategy import pipelines
from passes.testing.search import Failure, search
from passes.testing.tally import Tally
from passes.testing.trial import CaptureRefused, Trial

MOST_UNTOUCHED = 0.3
"""A larger share of models on which no rule fired says that the models miss what the rules look for."""

LONG = 10_000
"""Models from which on a run is to show every rule at work, and every requirement refusing."""

SEGMENT = 1000
"""Models to a process: TorchScript keeps what it compiled for as long as its process lives."""

CHUNK = 250
"""Models between two reports of a process."""

MOST_FAILURES = 8
"""Failures to minimize in one segment; later ones are counted."""

MOST_SECONDS = 60
"""For one model; what takes longer hangs."""

MOST_DEATHS = 10
"""Processes that die are replaced, until so many have."""

DTYPES = (torch.float64, torch.float64, torch.float64, torch.float32)
FRONTENDS = ("trace",) * 16 + ("fx", "fx", "script", "export")
UNMEASURED = {"lower_onednn": "lower_onednn:variant=fused"}
"""Measuring takes time and comes out differently every time: the trials of `optimize` alone do it."""

ENGINES = (None,) * 18 + ("aten", "onednn_ops")


@st.composite
def trials(draw: st.DrawFn, names: Sequence[str] = tuple(CATALOGUE)) -> Trial:
    """A random model and what is done to it."""
    model = draw(random_models(dtypes=DTYPES))
    engine, frontend = draw(st.sampled_from(ENGINES)), draw(st.sampled_from(FRONTENDS))
    if engine is not None:  # a lowering stands for one engine; `optimize` adds that of the engine asked for
        names = [name for name in names if CATALOGUE[name].target is None]
    return Trial(model, tuple(UNMEASURED.get(name, name) for name in draw(pipelines(names))), frontend, engine)


# -- one process --------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """What one process is to do, where it writes what it did, and the kinds of failure that need no second report."""

    number: int
    examples: int
    seed: int
    directory: Path
    passes: tuple[str, ...] = tuple(CATALOGUE)
    known: list[str] = field(default_factory=list)

    @property
    def result(self) -> Path:
        return self.directory / f"{self.number}.json"

    @property
    def running(self) -> Path:
        """The running trial, as a test: the file that is left when the process dies."""
        return self.directory / f"{self.number}.running.py"


def run_segment(segment: Segment) -> None:
    """Run the trials of a segment; write the tally and the failures after every chunk."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.freeze()  # torch's own objects, which every collection would walk over
    tally, refused, known = Tally(), Tally(), set(segment.known)
    failures: list[dict[str, str]] = []

    def run(trial: Trial) -> Tally:
        segment.running.write_text(trial.as_test("the process died"))
        with time_limit(MOST_SECONDS):
            return trial.run()

    def expected(failure: Failure) -> bool:
        if isinstance(failure.error, CaptureRefused):
            refused.captured[str(failure.error)] += 1
            return True
        if failure.kind in known or len(failures) >= MOST_FAILURES:
            refused.captured[f"failed again: {failure.kind}"] += 1
            return True
        return False

    for round_ in range(10 * math.ceil(segment.examples / CHUNK)):
        left = segment.examples - tally.models
        if left <= 0:
            break
        seed = segment.seed * 1000 + round_
        found, failure = search(trials(segment.passes), run, examples=min(left, CHUNK), seed=seed, expected=expected)
        tally.add(found)
        if failure is not None:
            tally.models += 1
            known.add(failure.kind)
            failures.append({"kind": failure.kind, "why": failure.why, "test": failure.trial.as_test(failure.why)})
        forget_compiled_code()
        counted = Tally.from_dict(tally.to_dict())
        counted.add(refused)
        partial = segment.result.with_suffix(".partial")
        partial.write_text(json.dumps({"tally": counted.to_dict(), "failures": failures}))
        partial.replace(segment.result)
    segment.running.unlink(missing_ok=True)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in what runs longer than that (where there are alarms: not on Windows)."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"it ran for more than {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# -- all of them --------------------------------------------------------------------------------------------------------


def fuzz(
    examples: int, workers: int, seed: int, out: Path, console: Console, passes: Sequence[str] = tuple(CATALOGUE)
) -> tuple[Tally, list[dict[str, str]]]:
    """Run `examples` trials in `workers` processes at a time; what they did, and the failures, one of each kind."""
    directory = out / "segments"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    size = min(SEGMENT, math.ceil(examples / workers))
    waiting = [
        Segment(i, min(size, examples - i * size), seed * 100_000 + i, directory, tuple(passes))
        for i in range(math.ceil(examples / size))
    ]
    tally = Tally.of(CATALOGUE[name] for name in passes)
    failures: dict[str, dict[str, str]] = {}
    started, deaths = len(waiting), 0
    start = time.perf_counter()
    for segment, status in _run_all(waiting, workers, failures):
        models = tally.models
        if segment.result.exists():
            done = json.loads(segment.result.read_text())
            tally.add(Tally.from_dict(done["tally"]))
            failures |= {failure["kind"]: failure for failure in done["failures"] if failure["kind"] not in failures}
        if status != 0:
            kind = f"the process died with status {status}"
            test = segment.running.read_text() if segment.running.exists() else f'"""{kind}, before the first model."""\n'
            failures[f"{kind} (segment {segment.number})"] = {"kind": kind, "why": kind, "test": test}
            deaths += 1
            left = segment.examples - (tally.models - models) - 1
            if left > 0 and deaths < MOST_DEATHS:
                number = started + deaths
                waiting.append(replace(segment, number=number, examples=left, seed=seed * 100_000 + number))
        console.print(f"{tally.models} models, {time.perf_counter() - start:.0f} s, {len(failures)} kinds of failure")
    tally.seconds = time.perf_counter() - start
    shutil.rmtree(directory, ignore_errors=True)
    return tally, list(failures.values())


def _run_all(waiting: list[Segment], workers: int, failures: dict[str, Any]) -> Iterator[tuple[Segment, int]]:
    """Each segment and its exit status, as they end. Processes start afresh: torch's threads do not survive a fork."""
    start = multiprocessing.get_context("spawn").Process
    running: list[tuple[Segment, Any]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            segment = waiting.pop(0)
            segment.known = list(failures)
            process = start(target=run_segment, args=(segment,))
            process.start()
            running.append((segment, process))
        ended = [pair for pair in running if not pair[1].is_alive()]
        for segment, process in ended:
            running.remove((segment, process))
            yield segment, process.exitcode
        if not ended:
            time.sleep(0.05)


def too_rare(tally: Tally, examples: int) -> list[str]:
    """In a run of `LONG` models or more: the rules that fired less than once in a hundred, the requirements that all met."""
    if examples < LONG:
        return []
    rules = [f"{pass_.name}: {rule.name}" for pass_ in CATALOGUE.values() for rule in pass_.rules]
    rare = [f"fired {tally.rewrites[rule]} times only: {rule}" for rule in rules if tally.rewrites[rule] < examples // 100]
    return rare + [f"never refused: {reason}" for reason, times in tally.refusals.items() if times == 0]


def write_failures(failures: Sequence[dict[str, str]], out: Path) -> list[Path]:
    """`failures/test_<hash>.py`, one each; the hash is that of the test."""
    paths = []
    for failure in failures:
        path = out / "failures" / f"test_{hashlib.sha256(failure['test'].encode()).hexdigest()[:12]}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(failure["test"])
        paths.append(path)
    return paths


def main(
    examples: Annotated[int, typer.Option(help="How many models.", min=1)] = 1000,
    workers: Annotated[int, typer.Option(help="How many processes at a time.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="The same seed gives the same models.")] = 0,
    out: Annotated[Path, typer.Option(help="Where report.json and failures/ go.")] = Path("fuzz"),
    passes: Annotated[str, typer.Option(help="Names with commas between; all passes when left out.")] = "",
) -> None:
    """Random models through random pipelines, the invariants of every pass checked. Exits with 1 when something failed."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    names = [pass_.name for pass_ in find_passes(passes.split(","))] if passes else list(CATALOGUE)
    tally, failures = fuzz(examples, workers, seed, out, console, names)
    paths = write_failures(failures, out)
    for table in tally.tables(f"fuzz: seed {seed}"):
        console.print(table)
        console.print()
    for failure, path in zip(failures, paths, strict=True):
        console.print(f"{path}: {failure['why'].splitlines()[0]}", style="bold red", markup=False, highlight=False)
    untouched = tally.share_untouched > MOST_UNTOUCHED
    if untouched:
        console.print(f"no rule fired on {tally.share_untouched:.0%} of the models; at most {MOST_UNTOUCHED:.0%} are allowed")
    idle = too_rare(tally, examples)
    for line in idle:
        console.print(line, style="bold red", markup=False, highlight=False)
    report = {**tally.to_dict(), "share_untouched": tally.share_untouched, "seed": seed,
              "failures": [{"file": str(p), "why": f["why"]} for f, p in zip(failures, paths)]}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2))
    sys.exit(1 if failures or untouched or idle else 0)


if __name__ == "__main__":
    typer.run(main)
