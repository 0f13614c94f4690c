"""A sample of the zoo, small enough for every run of the tests; and the runner, `python -m benchmarks.zoo`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import zoo
from benchmarks.zoo import Results, markdown, run, run_one, summary
from benchmarks.zoo_models import LIST, SAMPLE, Entry, padding_mask, read_list
from benchmarks.zoo_one import FULL_SQNR_DB, Row, try_model

ENTRIES = {entry.title: entry for entry in read_list()}


@pytest.mark.parametrize("title", SAMPLE)
def test_a_model_of_the_zoo_is_compiled_and_verified(title: str) -> None:
    row = try_model(ENTRIES[title])
    assert row.error == ""
    assert row.frontend == "export" and row.nodes > 0 and row.rewrites > 0
    assert row.sqnr_db is not None and row.sqnr_db >= FULL_SQNR_DB
    assert row.half_sqnr_db is not None and 8 <= row.half_sqnr_db < row.sqnr_db


# -- the list -----------------------------------------------------------------------------------------------------------


def test_the_list_is_large_and_diverse() -> None:
    assert len(ENTRIES) >= 120
    for source in ("torchvision", "timm", "transformers"):
        assert sum(entry.source == source for entry in ENTRIES.values()) >= 40


def test_an_entry_says_how_its_model_is_built_and_called(tmp_path: Path) -> None:
    one = "torchvision:alexnet num_classes=7\n    | 1x3x64x64  mask=2x8:mask n=3\n"
    two = 'timm:vit a=[1,2] b={"c":null} | x=4x4:int64:9\n'
    (tmp_path / "list.txt").write_text(f"# head\n{one}\n{two}")
    first, second = read_list(tmp_path / "list.txt")
    assert first == Entry("torchvision", "alexnet", {"num_classes": 7}, ("1x3x64x64", "mask=2x8:mask", "n=3"))
    assert second.options == {"a": [1, 2], "b": {"c": None}}
    (x,), kwargs = first.arguments()
    assert x.shape == (1, 3, 64, 64) and kwargs["n"] == 3 and torch.equal(kwargs["mask"], padding_mask([2, 8]))
    assert torch.equal(x, first.arguments()[0][0])
    assert first.build()(x).shape == (1, 7)


@pytest.mark.parametrize("line", ["torchvision:alexnet", "alexnet | 1x3x64x64", "nowhere:x | 1", "timm:a |", "timm: | 1x1"])
def test_a_line_that_is_no_entry(line: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(line)
    with pytest.raises(ValueError, match="is no entry"):
        read_list(tmp_path / "list.txt")


def test_a_model_named_twice(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("timm:a | 1x1\ntimm:a | 2x2\n")
    with pytest.raises(ValueError, match="names timm:a more than once"):
        read_list(tmp_path / "list.txt")


def test_parameters_that_start_as_zeros_are_made_random() -> None:
    model = ENTRIES["torchvision:vit_b_32"].build()  # its head starts as zeros, and would answer zeros
    assert all(parameter.any() for parameter in model.parameters())


def test_a_model_whose_outputs_are_constant_is_a_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "build", lambda entry: torch.nn.Threshold(1e9, 0.0))
    assert "Miss: every output is constant" in try_model(ENTRIES["torchvision:resnet18"]).error


# -- the runner ---------------------------------------------------------------------------------------------------------


def test_a_model_runs_in_a_process_of_its_own() -> None:
    row = run_one(ENTRIES["transformers:BertModel"], LIST, timeout=120, memory=8, kind=Row)
    assert row.error == "" and row.frontend == "export"


def test_a_model_that_takes_too_long_is_a_miss() -> None:
    assert run_one(ENTRIES["torchvision:resnet18"], LIST, timeout=0.01, memory=8, kind=Row).error == "took longer than 0.01 s"


def test_a_model_that_needs_too_much_memory_is_a_miss() -> None:
    assert run_one(ENTRIES["torchvision:alexnet"], LIST, timeout=120, memory=0.4, kind=Row).error != ""


def test_a_run_goes_on_where_the_last_one_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [ENTRIES[title] for title in SAMPLE[:3]]
    (tmp_path / "list.txt").write_text("".join(f"{e.title} | 1x1\n" for e in entries))
    done = Row(entries[0].title, "export", 3, 2, 1, float("inf"), 40.0, seconds=1.0)
    (tmp_path / "rows.jsonl").write_text(done.to_json() + "\n" + Row(entries[1].title).to_json()[:20])
    ran = []

    def noted(entry: Entry, *rest: object) -> Row:
        ran.append(entry.title)
        return Row(entry.title, error="float32: Miss: |why|")

    monkeypatch.setattr(zoo, "run_one", noted)

    def command(*options: str) -> None:
        files = ("--list", str(tmp_path / "list.txt"), "--out", str(tmp_path))
        monkeypatch.setattr("sys.argv", ["zoo", *files, *options])
        zoo.main()

    command()
    command()  # finds everything done
    assert ran == [e.title for e in entries[1:]]
    table = (tmp_path / "zoo.md").read_text()
    assert "captured 1 of 3 (33.3 %)" in table and "| export | 3 | 2 | 1 | equal | 40.0 | 1.0 |" in table
    assert table.count("float32: Miss: \\|why\\|") == 2 and table.count("float32: Miss: |why|") == 2
    command("--fresh", "--only", "lcnet")
    assert ran[2:] == ["timm:lcnet_050"]


def test_the_last_row_of_a_model_counts(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl", Row)
    results.add(Row("a", error="first"))
    results.add(Row("a", "export"))
    assert Results(tmp_path / "rows.jsonl", Row).rows == {"a": Row("a", "export")}
    assert all(json.loads(line)["model"] == "a" for line in (tmp_path / "rows.jsonl").read_text().splitlines())


def test_what_was_not_run_yet_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    assert summary([Row("a"), Row("b", error="why")], 4) == "captured 1 of 4 (25.0 %)\n2 not run yet\n  b: why"
    assert markdown([], 0).startswith("captured 0 of 0")
    run([], Results(Path("nowhere"), Row), LIST, 1, 1, Console())
