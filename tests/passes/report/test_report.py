"""The printed report, read as a stranger would, and its dict."""

import json
import math
from dataclasses import dataclass, replace
from io import StringIO

import pytest
import torch
from rich.console import Console

from ir_tools.ir import Block
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.cast import Casts, Traffic
from ir_tools.rewrite.rewrite_log import Refusal, Rewrite
from passes import optimize
from passes.cli import commands
from passes.report.data import StepReport
from passes.report.rendering import locations
from passes.report.report import Report, rendering
from passes.tune.speed_comparison import Speed


def rewrites(count: int) -> list[Rewrite]:
    return [Rewrite(f"fold@bn{i}", "batch_norm(layer(x)) -> layer(x)", f"layer1.{i}.bn1") for i in range(count)]


def refusals(count: int, reason: str, module: str = "head") -> list[Refusal]:
    return [Refusal(f"fold@{module}{i}", "rule", f"{module}.{i}", reason) for i in range(count)]


def full() -> Report:
    return Report(
        frontend="trace",
        frontend_reason="after export refused",
        frontend_refusals={"export": "CaptureError: data-dependent branch\nand a second line"},
        engine="onednn_ops",
        capture_seconds=1.2,
        captured_nodes=175,
        captured_sqnr_db=math.inf,
        captured_max_abs_error=0.0,
        steps=[
            StepReport("remove_dropout", nodes_before=175, nodes_after=175, sqnr_db=math.inf, max_abs_error=0.0),
            StepReport(
                "fuse_conv_bn",
                effects=("rounds",),
                seconds=0.21,
                nodes_before=175,
                nodes_after=122,
                rewrites=rewrites(53),
                refusals=refusals(2, "the batch norm uses the statistics of the batch") + refusals(5, "rank unknown"),
                max_abs_error=1.2e-6,
                sqnr_db=120.31,
            ),
            StepReport(
                "cast_half",
                {"dtype": torch.bfloat16, "level": "O2"},
                ("rounds", "lowers_precision"),
                nodes_before=122,
                nodes_after=130,
                rewrites=rewrites(4),
                max_abs_error=0.0123,
                sqnr_db=41.2,
            ),
        ],
        emit_seconds=0.8,
        verified=True,
        sqnr_db=41.2,
        max_abs_error=0.0123,
        seconds=6.6,
        notes=["bf16 is native here"],
        inputs=["x: float32[1, 3, 224, 224]"],
        ops_left={"relu": 3, "_convolution_pointwise": 53},
    )


def row(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.split()


def test_every_pass_has_a_row_with_its_numbers():
    text = str(full())
    assert row(text, "remove_dropout") == ["remove_dropout", "0", "0", "175", "0", "equal", "0.00"]
    assert row(text, "fuse_conv_bn  ") == ["fuse_conv_bn", "53", "7", "175→122", "1.2e-06", "120.3", "0.21"]
    assert row(text, "cast_half") == ["cast_half", "4", "0", "122→130", "1.2e-02", "41.2", "0.00"]
    assert "dtype=bfloat16" in text and "level=O2" in text


def test_header_says_front_end_and_why_inputs_and_engine():
    text = str(full())
    assert row(text, "front end")[2:] == ["trace", "(after", "export", "refused)"]
    assert "not export: CaptureError: data-dependent branch" in text
    assert "a second line" not in text
    assert "175 ops in 1.20 s, bitwise equal to the eager model" in text
    assert "x: float32[1, 3, 224, 224]" in text
    assert row(text, "engine") == ["engine", "onednn_ops"]


def test_outcome_and_notes():
    text = str(full())
    assert "verified: SQNR 41.2 dB, max error 1.2e-02 against the eager model" in text
    assert "not verified" not in text and "nothing changed" not in text
    assert "took 6.60 s, of which emission 0.80 s" in text
    assert "ops: _convolution_pointwise ×53, relu ×3" in text
    assert "bf16 is native here" in text


def test_not_verified_is_reported():
    report = full()
    report.verified = False
    text = str(report)
    assert "not verified: no numbers were compared with the eager model" in text
    assert "verified: SQNR" not in text


@pytest.mark.parametrize("dry_run, words", [(False, "nothing changed"), (True, "nothing would change")])
def test_nothing_changed_is_reported(dry_run, words):
    report = Report(steps=[StepReport("fuse_conv_bn", nodes_before=4, nodes_after=4)], dry_run=dry_run)
    assert words in str(report)
    assert not report.changed
    assert report.to_dict()["changed"] is False


def test_a_pass_that_only_removes_nodes_changed_something():
    report = Report(steps=[StepReport("remove_dead_code", nodes_before=4, nodes_after=3)])
    assert report.changed and "nothing changed" not in str(report)


def test_dry_run_claims_no_numbers_and_no_emission():
    report = full()
    report.dry_run = True
    assert "dry run: nothing was emitted" in str(report)
    assert "verified" not in str(report)


def test_refusals_are_grouped_and_the_most_frequent_come_first():
    text = str(full())
    often = text.index("fuse_conv_bn: rank unknown ×5")
    seldom = text.index("fuse_conv_bn: the batch norm uses the statistics of the batch ×2")
    assert often < seldom
    assert "head.0, head.1, head.2, … 2 more" in text
    assert "head.4" not in text


def test_refusals_are_capped():
    report = Report(steps=[StepReport("a", refusals=[r for i in range(30) for r in refusals(1, f"reason {i}.")])])
    text = str(report)
    assert "reason 11 ×1" in text and "reason 12 " not in text
    assert "… 18 more reasons, 18 sites" in text


def test_locations_names_each_module_once():
    assert locations(["a", "a", "b"]) == "a, b"
    assert locations(["a", "b", "c", "d", "d", "e"]) == "a, b, c, … 2 more"


def test_text_fits_80_columns_without_colour():
    report = full()
    report.steps[1].name = "a_pass_with_quite_a_long_name"
    report.steps[1].nodes_before, report.steps[1].nodes_after = 123456, 123455
    report.notes = ["a long note " * 20]
    text = str(report)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    for part in ("53", "120.3", "1.2e-06", "123456→123455"):
        assert part in text


def test_rich_prints_colour_on_a_terminal_and_none_into_a_pipe():
    terminal = Console(file=StringIO(), force_terminal=True, color_system="standard", width=100)
    terminal.print(full())
    assert "\x1b[" in terminal.file.getvalue()
    pipe = Console(file=StringIO(), force_terminal=False, width=80)
    pipe.print(full())
    assert "\x1b[" not in pipe.file.getvalue()


def test_square_brackets_in_texts_are_not_markup():
    report = Report(steps=[StepReport("a", refusals=refusals(1, "axis [bold] of [/x]"))], notes=["[red]"])
    assert "axis [bold] of [/x]" in str(report)
    assert "[red]" in str(report)


def test_dict_is_json():
    plain = full().to_dict()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again == plain
    assert plain["captured_sqnr_db"] == "inf"
    assert plain["steps"][1]["rewrites"][0]["module"] == "layer1.0.bn1"
    assert plain["steps"][2]["options"] == {"dtype": "bfloat16", "level": "O2"}
    assert plain["sqnr_db"] == 41.2


def test_rewrites_are_grouped_by_pass_and_rule():
    pipe = Console(file=StringIO(), width=80)
    pipe.print(*rendering.rewritten(full()), sep="\n")
    text = pipe.file.getvalue()
    assert "fuse_conv_bn: batch_norm(layer(x)) -> layer(x) ×53" in text
    assert "layer1.0.bn1, layer1.1.bn1, layer1.2.bn1, … 50 more" in text


# -- expected refusals --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silent(Refusal):
    """As `Refusal` is with a field `expected`."""

    expected: bool = False


def test_expected_refusals_are_data_and_not_printed(capsys):
    def step(*refusals: Refusal) -> Report:
        return Report(steps=[StepReport("cast_half", refusals=list(refusals))], dry_run=True)

    quiet, loud = Silent("a@1", "a", "embed", "integers stay integers", True), Silent("a@2", "a", "head", "too large", False)
    report = step(quiet, loud)
    assert "too large ×1" in str(report) and "integers" not in str(report)
    assert row(str(report), "cast_half ")[2] == "1" and row(str(step(quiet)), "cast_half ")[2] == "0"
    assert "refused\n" not in str(step(quiet))
    assert [r["expected"] for r in report.to_dict()["steps"][0]["refusals"]] == [True, False]
    commands._explain(report, Console(width=80))
    out = capsys.readouterr().out
    assert "integers stay integers ×1" in out and "too large ×1" in out


# -- casts and ranges ---------------------------------------------------------------------------------------------------

MOVED = Casts(Traffic(), Traffic(107, 93_400_000), Traffic(4, 1_234_567))


def unwrapped(report: Report) -> str:
    return " ".join(str(report).split())


def test_casts_are_a_line_that_says_what_they_move():
    report = full()
    report.steps[2].casts = MOVED
    report.steps[2].ranges = "64 calls of calibration_data"
    text = unwrapped(report)
    line = "cast_half: 4 dtype casts, 1.2 MB per run (per-op autocast: 107 casts, 93 MB); 0 before"
    assert line in text and "reverted" not in text
    assert "cast_half: ranges observed on 64 calls of calibration_data" in text
    assert "dtype cast" not in str(full()) and "ranges" not in str(full())
    report.dry_run = True
    assert line in unwrapped(report)
    assert max(map(len, str(report).splitlines())) <= 80


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_949, "9.9 kB"), (9_950, "10 kB"), (999_499, "999 kB"),
     (999_500, "1.0 MB"), (5 * 10**9, "5.0 GB")],
)  # fmt: skip
def test_bytes_are_printed_in_decimal_units(count, text):
    report = Report(steps=[StepReport("cast", casts=Casts(after=Traffic(1, count)))])
    assert f"1 dtype cast, {text} per run" in unwrapped(report)


def test_no_casts_are_no_line():
    report = Report(steps=[StepReport("cast", casts=Casts())])
    assert "dtype cast" not in str(report) and report.to_dict()["steps"][0]["casts"]["after"] == {"count": 0, "bytes": 0}
    for moved in (Casts(before=Traffic(1, 8)), Casts(one_by_one=Traffic(1, 8)), Casts(after=Traffic(1, 8))):
        assert "dtype cast" in str(Report(steps=[StepReport("cast", casts=moved)]))


def test_casts_add_up():
    assert Traffic(1, 10) + Traffic(2, 5) == Traffic(3, 15)
    assert MOVED + Casts(Traffic(1, 1), Traffic(2, 2), Traffic(3, 3)) == Casts(
        Traffic(1, 1), Traffic(109, 93_400_002), Traffic(7, 1_234_570)
    )
    assert Casts() + MOVED == MOVED


def test_what_a_pass_says_of_its_casts_is_in_the_report():
    @graph_pass(effects=())
    def counts_casts(program: Block, log: RewriteLog) -> tuple[Block, Casts]:
        return program, MOVED

    report = optimize(torch.nn.ReLU().eval(), [counts_casts, "remove_dropout"], example_inputs=torch.ones(2)).report
    assert [step.casts for step in report.steps[:2]] == [MOVED, None]
    assert "counts_casts: 4 dtype casts, 1.2 MB per run" in unwrapped(report)
    first, second = json.loads(json.dumps(report.to_dict()))["steps"][:2]
    assert first["casts"]["one_by_one"] == {"count": 107, "bytes": 93_400_000} and second["casts"] is None


# -- the speed comparison -----------------------------------------------------------------------------------------------


def test_the_speed_comparison_stands_behind_that_of_the_numbers():
    report = full()
    report.speed = Speed("cast_half", "bfloat16", "float32", "faster", 0.0051, 0.0027, 40, seconds=1.5)
    lines = str(report).splitlines()
    at = lines.index("bfloat16: 5.1 → 2.7 ms, 1.89x as fast as float32 on this machine")
    assert lines[at - 1].startswith("verified") and lines[at + 1].startswith("took 6.60 s")
    assert lines[at + 1].endswith("the speed comparison 1.50 s")
    assert report.to_dict()["speed"]["ratio"] == pytest.approx(1.889, abs=1e-3)


@pytest.mark.parametrize(
    "decision, words",
    [("warned", "returning the float16 model (on_slower='warn')"), ("kept", "returning the float16 model (on_slower='keep')"),
     ("reverted", "returning the float32 model (on_slower='revert')")],
)  # fmt: skip
def test_a_slower_model_is_reported_loudly(decision, words):
    report = full()
    report.speed = Speed("cast_half", "float16", "float32", decision, 0.0051, 0.0102, 40)
    line = f"float16 is SLOWER than float32 on this machine: 5.1 → 10.2 ms, 0.50x as fast; {words}"
    assert line in unwrapped(report) and report.to_dict()["speed"]["slower"] is True


def test_models_without_a_dtype_of_their_own_are_named_by_the_pass():
    slower = Speed("fuses", "", "", "kept", 1.0, 2.0, 5)
    assert str(slower).endswith("returning the model with fuses (on_slower='keep')")
    assert str(replace(slower, decision="reverted")).endswith("returning the model without fuses (on_slower='revert')")


def test_no_comparison_says_why():
    report = full()
    report.speed = Speed("cast_half", "float16", "float32", "unknown", reason="EmitError: no second time")
    assert "float16 was not timed against float32: EmitError: no second time" in unwrapped(report)
    assert report.to_dict()["speed"]["ratio"] is None


def test_a_step_that_was_reverted_says_so_and_counts_as_no_change():
    step = StepReport("cast_half", {"level": "O2"}, nodes_before=3, nodes_after=5, rewrites=rewrites(2), casts=MOVED)
    step.reverted = "float16 is SLOWER than float32"
    report = Report(steps=[step])
    text = str(report)
    assert row(text, "cast_half ") == ["cast_half", "2", "0", "3→5", "-", "-", "0.00"]
    assert "  level=O2\n  reverted" in "\n".join(line.rstrip() for line in text.splitlines())
    assert "0 before (reverted)" in unwrapped(report)
    assert not step.changed and not report.changed and "nothing changed" in text
    assert "cast_half" not in str(list(rendering.idle(report)))
    assert report.to_dict()["steps"][0]["reverted"] == "float16 is SLOWER than float32"


def test_options_of_several_values_are_printed_as_they_are_written():
    step = StepReport("cast_half", {"keep_float": ("encoder", "softmax"), "overrides": {"head": "O1"}})
    text = "".join(str(Report(steps=[step])).split())  # the column is narrow
    assert "keep_float=encoder+softmax" in text and "overrides=head=O1" in text
