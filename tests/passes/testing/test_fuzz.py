"""The fuzz command: counts, tables, tests to paste, exit status; and it survives what it finds."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from rich.console import Console

from passes import CATALOGUE, CaptureError, Pass
from passes.driver.catalogue import find_passes
from passes.driver.pipeline import check_order
from passes.testing import InvariantBroken, fuzz, random_models
from passes.testing.fuzz import Segment, run_segment, trials, write_failures
from passes.testing.search import Failure, search
from passes.testing.tally import Tally
from passes.testing.trial import CaptureRefused, Trial, raised_by_capturing

PASSES = "fold_constants,remove_dropout,fuse_conv_bn,fuse_conv_relu"


def test_twenty_examples_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "passes.testing.fuzz", "--examples", "20", "--workers", "1", "--seed", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path), "--passes", PASSES], capture_output=True, text=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"] == 20 and not report["failures"] and not list(tmp_path.glob("failures/*"))
    assert done.returncode == (1 if report["share_untouched"] > fuzz.MOST_UNTOUCHED else 0), done.stdout + done.stderr
    assert "models a second" in done.stdout and "rewrites, by rule" in done.stdout and "20 models" in done.stdout


def test_trials_are_legal_and_varied() -> None:
    found: list[Trial] = []

    @settings(max_examples=300, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(trials())
    def collect(trial: Trial) -> None:
        check_order(find_passes(trial.passes))
        found.append(trial)

    collect()
    assert {trial.frontend for trial in found} == {"trace", "fx", "script", "export"}
    assert {trial.engine for trial in found} == {None, "aten", "onednn_ops"}
    assert len({trial.passes for trial in found}) > 50


def broken(pass_: Pass) -> Pass:
    """The pass, on a graph that is no graph of the model's."""

    def wrong(program, log):
        if program.calls:
            raise ZeroDivisionError("a crash of our own")
        return program

    return Pass(pass_.name, wrong, pass_.effects, pass_.doc)


def test_what_fails_is_made_small_and_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test for one kind of failure; the run goes on, and the others count as failed again."""
    monkeypatch.setitem(CATALOGUE, "remove_dropout", broken(CATALOGUE["remove_dropout"]))
    segment = Segment(0, 40, 0, tmp_path, ("remove_dropout",))
    run_segment(segment)
    done = json.loads(segment.result.read_text())
    tally = Tally.from_dict(done["tally"])
    (failure,) = done["failures"]
    assert tally.models >= 40 and "ZeroDivisionError" in failure["kind"] and not segment.running.exists()
    assert any(kind.startswith("failed again: ZeroDivisionError") for kind in tally.captured)

    (path,) = write_failures([failure], tmp_path)
    text = path.read_text()
    assert path.name.startswith("test_") and text.count("\n") < 40
    assert {line for line in text.splitlines() if "import" in line} == {
        "import torch", "from torch import nn", "from torch.nn import functional as F", "from passes.testing import hold",
    }  # fmt: skip
    names = runpy.run_path(str(path))
    (test,) = (value for name, value in names.items() if name.startswith("test_"))
    with pytest.raises(ZeroDivisionError):
        test()
    monkeypatch.undo()
    test()


def test_errors_of_torch_in_capturing_are_distinguished_from_our_own() -> None:
    model = next(iter(drawn(1)))
    trial = Trial(model, (), "fx")
    assert trial.run().models == 1
    try:
        torch.fx.symbolic_trace(lambda x: [y for y in x])
    except Exception as error:
        assert raised_by_capturing(error)
    assert not raised_by_capturing(ValueError())
    assert issubclass(CaptureRefused, Exception) and not issubclass(CaptureRefused, CaptureError)


def test_a_process_that_dies_is_reported_and_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was at when it died is kept as a test; another process runs what it left."""
    seen: list[Segment] = []

    def run_all(waiting: list[Segment], workers: int, failures: dict):
        while waiting:
            segment = waiting.pop(0)
            seen.append(segment)
            if len(seen) == 1:
                segment.running.write_text('"""the process died"""\n')
            else:
                segment.result.write_text(json.dumps({"tally": Tally(models=segment.examples).to_dict(), "failures": []}))
            yield segment, -11 if len(seen) == 1 else 0

    monkeypatch.setattr(fuzz, "_run_all", run_all)
    tally, failures = fuzz.fuzz(10, 1, 0, tmp_path, Console(quiet=True), ["remove_dropout"])
    assert [failure["kind"] for failure in failures] == ["the process died with status -11"]
    assert failures[0]["test"] == '"""the process died"""\n'
    assert [segment.examples for segment in seen] == [10, 9] and seen[0].seed != seen[1].seed and tally.models == 9


def test_what_hangs_is_a_failure() -> None:
    with pytest.raises(TimeoutError, match="more than 1 seconds"), fuzz.time_limit(1):
        time.sleep(3)


def drawn(count: int) -> list:
    found: list = []

    @settings(max_examples=count, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    @given(random_models())
    def collect(model) -> None:
        found.append(model)

    collect()
    return found


def test_a_search_finds_the_smallest_it_saw_when_its_time_is_up() -> None:
    def fails(trial: Trial) -> Tally:
        raise InvariantBroken("always")

    one = trials(("remove_dropout",))
    _, failure = search(one, fails, examples=10, seed=0, shrink_seconds=0.0)
    assert isinstance(failure, Failure) and failure.kind == "InvariantBroken: always"
    _, smaller = search(one, fails, examples=10, seed=0, shrink_seconds=3.0)
    assert smaller is not None and smaller.trial.size <= failure.trial.size


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_models_are_compiled_saved_and_loaded(engine: str) -> None:
    done = Trial(drawn(1)[0], ("fuse_conv_bn",), "trace", engine).run()
    assert done.captured[f"{engine}: emitted, saved, loaded"] == 1
