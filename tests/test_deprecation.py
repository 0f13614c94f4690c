"""Old names of what users type: each still works, and its `DeprecationWarning` names the new one at the user's own line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from ir_tools.ir import Block
from ir_tools.rewrite import Artifacts, OptionError, Pass, RewriteLog, table_pass
from ir_tools.rewrite.cast import Casts, Traffic
from ir_tools.rewrite.former_fields import CASTS, RANGES, TUNING_RECORDS
from ir_tools.rewrite.numeric_effects import declaration
from passes import CATALOGUE, DEFAULT, Rule, Value, graph_pass, optimize, rule_pass
from passes.cli.main import app
from passes.tune.tuning_record import TuningRecords
from tests.check import captured, graph_lines
from tests.timers import UseTimer, never, winner

X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


def renamed(old: str, new: str, function: Callable[[], Any]) -> Any:
    """What the function returns; it must warn once, at a line of this file."""
    with pytest.warns(DeprecationWarning) as heard:
        result = function()
    (warning,) = [w for w in heard if w.category is DeprecationWarning and "is now called" in str(w.message)]
    assert str(warning.message) == f"{old} is now called {new}; the old name works until the next release"
    assert warning.filename == __file__
    return result


@pytest.fixture
def recorded(use_timer: UseTimer, tmp_path: Path) -> tuple[nn.Module, Any, Path]:
    """A model, the result of optimising it, and a file of the tuning records; nothing may be measured again."""
    use_timer(winner(1))
    model, path = net(), tmp_path / "choices.json"
    fast = optimize(model, example_inputs=X)
    assert fast.report.tuning_records.not_default
    fast.report.tuning_records.save(path)
    use_timer(never)
    return model, fast, path


@needs_onednn
def test_optimize_takes_choices(recorded: tuple[nn.Module, Any, Path]) -> None:
    model, fast, path = recorded
    again = renamed("choices", "tuning_records", lambda: optimize(model, example_inputs=X, choices=path))
    assert graph_lines(again.program) == graph_lines(fast.program)
    with pytest.raises(OptionError, match="choices is the old name of tuning_records; give tuning_records alone"):
        optimize(model, example_inputs=X, choices=path, tuning_records=path)


@needs_onednn
def test_the_report_has_choices(recorded: tuple[nn.Module, Any, Path]) -> None:
    _, fast, _ = recorded
    assert renamed("report.choices", "report.tuning_records", lambda: fast.report.choices) is fast.report.tuning_records
    data = fast.report.to_dict()
    assert data["choices"] == data["tuning_records"] == fast.manifest["choices"]


@needs_onednn
def test_options_of_the_lowering(recorded: tuple[nn.Module, Any, Path]) -> None:
    model, fast, path = recorded
    old, new = "the option lower_onednn:choices", "lower_onednn:records"
    passes = [*DEFAULT, f"lower_onednn:choices={path}"]
    again = renamed(old, new, lambda: optimize(model, passes, example_inputs=X))
    assert graph_lines(again.program) == graph_lines(fast.program)
    lower = CATALOGUE["lower_onednn"]
    fused = renamed("the option lower_onednn:choose", "lower_onednn:variant", lambda: lower.with_options(choose="fused"))
    assert fused.given == {"variant": "fused"} and str(fused) == "lower_onednn:variant=fused"
    with pytest.raises(OptionError, match="lower_onednn: variant must be one of 'measured', 'fused', got 'apart'"):
        renamed("the option lower_onednn:choose", "lower_onednn:variant", lambda: lower.with_options(choose="apart"))
    with pytest.raises(OptionError, match="lower_onednn: choose is the old name of variant; give variant alone"):
        optimize(model, ["lower_onednn:variant=fused:choose=fused"], example_inputs=X)


def test_a_pass_of_the_users_own_may_rename_its_options() -> None:
    @graph_pass(effects=(), renamed={"speed": "mode"})
    def looks_around(program: Block, log: RewriteLog, *, mode: Literal["fast", "slow"] = "fast") -> Block:
        return program

    old = renamed("the option looks_around:speed", "looks_around:mode", lambda: looks_around.with_options(speed="slow"))
    assert old.given == {"mode": "slow"} and "speed" not in old.option_syntax
    with pytest.raises(OptionError, match="has no option 'pace'; it has: mode"):
        looks_around.with_options(pace="slow")


@needs_onednn
def test_the_command_line_takes_choices(use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    torch.jit.trace(net(), X).save("net.pt")
    command = ["optimize", "net.pt", "--input", "1x3x6x6", "--no-bench"]
    use_timer(winner(1))
    with pytest.warns(DeprecationWarning, match="--choices is now called --tuning-records"):
        said = CliRunner().invoke(app, [*command, "--choices", "old.json"]).output
    assert "written to old.json" in said and TuningRecords.load("old.json").table
    use_timer(never)
    with pytest.warns(DeprecationWarning, match="--choices is now called --tuning-records"):
        said = CliRunner().invoke(app, [*command, "--choices", "old.json"]).output
    assert "0 workloads measured" in said
    result = CliRunner().invoke(app, [*command, "--choices", "old.json", "--tuning-records", "new.json"])
    assert result.exit_code == 2 and "--choices is the old name of --tuning-records" in result.stderr
    shown = CliRunner().invoke(app, ["optimize", "--help"]).output
    assert "--tuning-records" in shown and "--choices" not in shown


@needs_onednn
def test_old_names_on_the_command_line_are_reported_on_the_terminal(tmp_path: Path) -> None:
    """Though Python hides a `DeprecationWarning` by default."""
    torch.jit.trace(net(), X).save(tmp_path / "net.pt")
    command = [sys.executable, "-m", "passes", "optimize", "net.pt", "--input", "1x3x6x6", "--no-bench", "--dry-run"]
    old = ["--passes", "lower_onednn:choose=measured", "--choices", "old.json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*command, *old], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "--choices is now called --tuning-records" in done.stderr
    assert "the option lower_onednn:choose is now called lower_onednn:variant" in done.stderr


@needs_onednn
def test_new_names_do_not_warn(recorded: tuple[nn.Module, Any, Path]) -> None:
    model, _, path = recorded
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*is now called")
        report = optimize(model, [*DEFAULT, "lower_onednn:variant=measured"], example_inputs=X, tuning_records=path).report
        assert str(report) and report.to_dict() and report.tuning_records.replayed


# -- for authors of passes --------------------------------------------------------------------------------------------


def test_a_requirement_asks_for_the_place_of_a_value() -> None:
    asked: list[str] = []

    def pair(op, x: Value):
        return op.relu(op.relu(x, name="inner"))

    def is_asked(inner) -> bool:
        """The value is asked for its location."""
        asked.append(renamed("place of a value", "location", lambda: inner.place))
        return True

    rule = Rule("relu(relu(x)) -> relu(x)", match=pair, requires=[is_asked], replace=lambda op, x: op.relu(x))
    model = nn.Sequential(nn.ReLU(), nn.ReLU()).eval()
    rule_pass("one_relu", [rule], effects=(), doc="")(captured(model, X))
    assert asked == ["0"]


def test_a_rule_takes_run_numbers() -> None:
    def once(op, x: Value):
        return op.relu(x)

    def rule() -> Rule:
        return Rule("relu(x) -> relu(x)", match=once, replace=once, takes_run_numbers=True)

    assert renamed("takes_run_numbers= of a rule", "takes_runtime_numbers=", rule).takes_runtime_numbers


def test_spellings_of_a_pass() -> None:
    pass_ = CATALOGUE["cast_half"]
    assert renamed("spellings of a pass", "option_syntax", lambda: pass_.spellings) == pass_.option_syntax


DECLARED = {
    "exact": (),
    "reassociates": ("rounds",),
    "stabilises": ("rounds", "non_finite_may_become_finite"),
    "lower_precision": ("rounds", "lowers_precision"),
    "quantizes": ("rounds", "quantizes"),
}
"""Old declarations and the effects that they stand for."""


@pytest.mark.parametrize("old", DECLARED)
def test_a_pass_declares(old: str) -> None:
    def function(program: Block, log: RewriteLog) -> Block:
        return program

    effects = DECLARED[old]
    names = f"declares={old!r} of a pass", f"effects={{{', '.join(map(repr, effects))}}}" if effects else "effects=()"
    for make in (
        lambda: graph_pass(declares=old)(function),
        lambda: rule_pass("function", [], declares=old, doc=""),
        lambda: table_pass("function", {}, declares=old, doc=""),
        lambda: Pass("function", function, old),  # type: ignore[arg-type]
    ):
        pass_ = renamed(*names, make)
        assert pass_.effects == set(effects)
        assert renamed("declares of a pass", "effects", lambda made=pass_: made.declares) == old
    report = optimize(net(), [pass_], example_inputs=X).report
    assert renamed("declares of a step", "effects", lambda: report.steps[0].declares) == old
    step = report.to_dict()["steps"][0]
    assert step["declares"] == old and step["effects"] == list(effects)


def test_effects_are_known_and_given_once() -> None:
    with pytest.raises(OptionError, match=r"declares is the old name of effects; give effects alone"):
        graph_pass(declares="exact", effects=())
    with pytest.raises(OptionError, match="a pass needs effects=, what it may do to numbers"):
        graph_pass()
    with pytest.raises(OptionError, match=r"effects must be a set of 'rounds', .*; got \{'rounding'\}"):
        graph_pass(effects={"rounding"})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"effects must be a set of 'rounds', .*; got 'rounds'"):
        graph_pass(effects="rounds")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"declares must be one of 'exact', .*, got 'rounds'; give effects="):
        graph_pass(declares="rounds")


def test_ranges_of_a_rewrite_log() -> None:
    """A pass that declared that it lowers precision, when that gave it ranges in its log."""
    seen: list[Any] = []

    def looks(program: Block, log: RewriteLog) -> Block:
        old, new = "ranges of a rewrite log", "the artifact Ranges of a pass"
        seen.append(renamed(old, new, lambda: log.ranges))
        return program

    with pytest.warns(DeprecationWarning):
        pass_ = graph_pass(declares="lower_precision")(looks)
    report = optimize(net(), [pass_], example_inputs=X, calibration_data=[X]).report
    assert report.steps[0].ranges == "1 call of calibration_data" and next(iter(seen[0].values())).largest > 0
    pass_(captured(net(), X))
    assert seen[1] == {}

    with pytest.warns(DeprecationWarning):
        by_position = Pass("looks", looks, "lower_precision")  # type: ignore[arg-type]
    for pass_ in (by_position, by_position.with_options()):
        report = optimize(net(), [pass_], example_inputs=X).report
        assert report.steps[0].ranges == "1 call of the example inputs" and seen.pop()
    with pytest.warns(DeprecationWarning):
        assert not Pass("looks", looks, "quantizes").reads_log_ranges  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "effects, old",
    [
        (("lowers_precision",), "lower_precision"),
        (("lowers_precision", "non_finite_may_become_finite"), "lower_precision"),
        (("rounds", "lowers_precision", "non_finite_may_become_finite"), "lower_precision"),
        (("non_finite_may_become_finite",), "stabilises"),
        (("quantizes",), "quantizes"),
        (("quantizes", "lowers_precision", "non_finite_may_become_finite"), "quantizes"),
    ],
)
def test_effects_that_no_declaration_spoke_of_give_that_of_the_strongest(effects: Any, old: str) -> None:
    assert declaration(effects) == old


@pytest.mark.parametrize("name", ["choices", "tuning_records"])
def test_tuning_records_of_a_rewrite_log(name: str) -> None:
    log, artifacts = RewriteLog(), Artifacts()
    CATALOGUE["lower_onednn"](captured(net(), X), log=log, artifacts=artifacts)
    old, new = f"{name} of a rewrite log", "the artifact TuningRecords of a pass"
    assert renamed(old, new, lambda: getattr(log, name)) is artifacts[TuningRecords]
    records = TuningRecords()
    renamed(old, new, lambda: setattr(log, name, records))
    assert artifacts[TuningRecords] is records


def test_a_log_of_two_runs_keeps_their_artifacts_apart() -> None:
    """What was entered before them under the old name, both are given; what the first run gave, the second is not."""
    moved, log, program = Casts(after=Traffic(2, 10)), RewriteLog(), captured(net(), X)
    inputs: list[Casts] = []

    @graph_pass(effects=())
    def gives_casts(program: Block, log: RewriteLog, casts: Casts) -> tuple[Block, Casts]:
        inputs.append(casts)
        return program, moved

    @graph_pass(effects=())
    def enters_casts(program: Block, log: RewriteLog, casts: Casts) -> Block:
        inputs.append(casts)
        with pytest.warns(DeprecationWarning):
            log.casts = moved
        return program

    for pass_ in (gives_casts, enters_casts, gives_casts):
        pass_(program, log=log)
        with pytest.warns(DeprecationWarning):
            assert log.casts == moved
    assert inputs == [Casts()] * 3
    with pytest.warns(DeprecationWarning):
        log.casts = moved
    gives_casts(program, log=log)
    gives_casts(program, log=log)
    assert inputs[3:] == [moved] * 2


def test_a_class_of_the_same_name_is_another_artifact() -> None:
    class Ranges(dict[str, int]):
        """Not those of `ir_tools.verify.ranges`."""

    @graph_pass(effects=())
    def gives_others(program: Block, log: RewriteLog) -> tuple[Block, Ranges]:
        return program, Ranges(a=1)

    log = RewriteLog()
    gives_others(captured(net(), X), log=log)
    with pytest.warns(DeprecationWarning):
        assert log.ranges == {}


def test_the_old_names_stand_for_classes_that_are_there() -> None:
    for name in (RANGES, CASTS, TUNING_RECORDS):
        module, _, kind = name.rpartition(".")
        assert getattr(importlib.import_module(module), kind).__module__ == module


def test_casts_of_a_rewrite_log() -> None:
    """A pass may still enter them there, and the report has them; or read them behind a pass."""
    moved = Casts(after=Traffic(2, 10))

    @graph_pass(effects=())
    def counts_casts(program: Block, log: RewriteLog) -> Block:
        renamed("casts of a rewrite log", "the artifact Casts of a pass", lambda: setattr(log, "casts", moved))
        return program

    report = optimize(net(), [counts_casts], example_inputs=X).report
    assert report.steps[0].casts == moved
    log = RewriteLog()
    counts_casts(captured(net(), X), log=log)
    assert renamed("casts of a rewrite log", "the artifact Casts of a pass", lambda: log.casts) == moved


def test_a_pass_takes_journal_or_log_and_not_both() -> None:
    pass_, program, log = CATALOGUE["remove_dropout"], captured(nn.Sequential(nn.Dropout(), nn.ReLU()).eval(), X), RewriteLog()
    renamed("journal= of a pass", "log=", lambda: pass_(program, journal=log))
    assert len(log.rewrites) == 1
    with pytest.raises(OptionError, match="journal= is the old name of log=; give log alone"):
        pass_(program, log=log, journal=log)
