"""A sample of the zoo through every front end: the same numbers, the same compute ops; and `python -m benchmarks.frontends`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import frontends_one
from benchmarks.frontends import cells, markdown, summary
from benchmarks.frontends_one import FrontendsRow, compute_ops, constant_ops, differences, try_frontends
from benchmarks.zoo import Results, run_one
from benchmarks.zoo_models import LIST, Entry, read_list
from ir_tools.frontends.capture import FRONTENDS, capture
from ir_tools.frontends.source import prepare
from passes import CATALOGUE

ENTRIES = {entry.title: entry for entry in read_list()}
ALL = ["export", "trace", "script", "fx"]
NOT_FX = ["export", "trace", "script"]
CAPTURED_BY = {
    "torchvision:mc3_18": ALL,
    "torchvision:squeezenet1_0": ALL,
    "timm:convit_tiny": NOT_FX,
    "timm:poolformer_s12": ALL,
    "timm:pvt_v2_b0": ALL,
    "timm:vit_tiny_patch16_224": ALL,
    "transformers:CLIPModel": ["export", "trace"],  # the Python of transformers is beyond torch.jit.script and fx
    "transformers:DebertaV2Model": ["export", "trace"],
    "transformers:WhisperModel": ["export", "trace"],
}


@pytest.mark.parametrize("title", CAPTURED_BY)
def test_the_front_ends_agree(title: str) -> None:
    row = try_frontends(ENTRIES[title])
    assert row.captured == CAPTURED_BY[title], row.refusals
    assert row.sqnr_db == dict.fromkeys(row.captured, math.inf)
    assert not row.error and not row.problems and not row.control_flow
    assert row.differing_ops == {}
    assert sum(row.ops["export"].values()) > 25


# -- the check can fail --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.tensor([4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).flatten(1) * torch.sqrt(self.scale)


class Branches(Small):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if bool(x.sum() > 1e9):
            y = self.norm(y)
        return y


SMALL = Entry("torchvision", "small", {}, ("2x3x8x8",))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "build", lambda entry: Small().eval())


def test_ops_on_inputs_and_ops_on_constants_are_counted_apart() -> None:
    program = capture(prepare(Small().eval(), [((torch.randn(2, 3, 8, 8),), {})]), "export").program
    assert compute_ops(program) == {"aten::conv2d": 1, "aten::batch_norm": 1, "aten::mul": 1}
    assert constant_ops(program) == {"aten::sqrt": 1}


def test_the_ops_that_differ_are_named() -> None:
    assert differences({"export": {"a": 1, "b": 2}, "fx": {"a": 1, "c": 3}}) == {
        "b": {"export": 2, "fx": 0},
        "c": {"export": 0, "fx": 3},
    }
    assert differences({"export": {"a": 1}, "fx": {"a": 1}}) == {}


@pytest.mark.usefixtures("small")
def test_a_front_end_with_another_op_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_frontends(SMALL).differing_ops == {}
    fold = CATALOGUE["fuse_conv_bn"]
    monkeypatch.setitem(FRONTENDS, "fx", lambda source, own=FRONTENDS["fx"]: fold(own(source)))
    row = try_frontends(SMALL)
    assert row.differing_ops == {"aten::batch_norm": {"export": 1, "trace": 1, "script": 1, "fx": 0}}
    assert "the ops agree: 0" in summary([row], 1) and "ops: batch_norm: export 1 trace 1 script 1 fx 0" in summary([row], 1)


@pytest.mark.usefixtures("small")
def test_a_front_end_with_other_numbers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert try_frontends(SMALL).same_numbers

    def scaled(source, own=FRONTENDS["fx"]):
        program = own(source)
        program.constants["norm.weight"] = program.constants["norm.weight"] * 1.01
        return program

    monkeypatch.setitem(FRONTENDS, "fx", scaled)
    row = try_frontends(SMALL)
    assert not row.same_numbers and 30 < row.sqnr_db["fx"] < 60
    assert "the numbers agree: 0" in summary([row], 1) and "numbers: export equal, trace equal" in summary([row], 1)


def test_a_program_with_branches_is_compared_in_numbers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entry, "build", lambda entry: Branches().eval())
    row = try_frontends(SMALL)
    assert row.captured == ["trace", "script"] and row.control_flow == ["script"] and row.same_numbers
    assert row.comparable == ["trace"] and "export: " in cells(row)[-2]
    assert "of which two or more have no control flow: 0, and the ops agree: 0" in summary([row], 1)


@pytest.mark.usefixtures("small")
def test_a_model_that_fails_eagerly_is_an_exception_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends_one, "eager_call", lambda entry: 1 / 0)
    row = try_frontends(SMALL)
    assert row.error == "eager: ZeroDivisionError: division by zero"
    assert "torchvision:small: not run: eager" in summary([row], 1)


# -- the runner ---------------------------------------------------------------------------------------------------------


def test_a_row_survives_its_file(tmp_path: Path) -> None:
    entry = ENTRIES["torchvision:squeezenet1_0"]
    row = run_one(entry, LIST, timeout=120, memory=8, kind=FrontendsRow)
    assert row.captured == ALL
    results = Results(tmp_path / "rows.jsonl", FrontendsRow)
    results.add(row)
    assert Results(tmp_path / "rows.jsonl", FrontendsRow).rows == {entry.title: row}
    assert json.loads((tmp_path / "rows.jsonl").read_text())["sqnr_db"]["fx"] == "inf"
    table = markdown([row], 1)
    assert "1 of 1 models; captured by 4 front ends: 1" in table and "| equal | equal | equal | equal | agree |" in table
