"""Calibration data for passes that lower precision: read once, checked, observed right before the pass."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.data import DataLoader, TensorDataset

from ir_tools.frontends.source import Example
from ir_tools.ir import Block
from ir_tools.rewrite import Pass, RewriteLog
from ir_tools.rewrite.numeric_effects import NUMERIC_EFFECTS
from ir_tools.verify.ranges import Range, Ranges, range_of
from passes import InputError, graph_pass, optimize
from passes.driver.instrumentation import observed
from passes.driver.step import Step, run_pass, wrap
from tests.check import captured

X = torch.ones(2, 4)


def looker(*effects: Any) -> tuple[Pass, list[dict[str, Range]]]:
    """A pass that changes nothing and records the ranges that it is given."""
    seen: list[dict[str, Range]] = []

    @graph_pass(effects=effects)
    def looks(program: Block, log: RewriteLog, ranges: Ranges, *, mode: Literal["a", "b"] = "a") -> Block:
        seen.append(dict(ranges))
        return program

    return looks, seen


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        y = self.linear(x).relu() * scale
        return y if shift is None else y + shift


def net() -> nn.Module:
    return Net().eval()


@pytest.mark.parametrize("options", [{}, {"verify": "off"}, {"dry_run": True}, {"verify": "ends", "engine": "aten"}])
def test_a_pass_that_lowers_precision_is_given_ranges_of_the_calibration_calls(options) -> None:
    looks, seen = looker()
    result = optimize(net(), [looks], example_inputs=X, calibration_data=[X * 10, (X * 1000,)], **options)
    (ranges,) = seen
    assert ranges["x"] == range_of(X * 10) + range_of(X * 1000)
    assert any(name.startswith("linear") for name in ranges) and len(ranges) >= 4
    report = result if options.get("dry_run") else result.report
    assert report.steps[0].ranges == "2 calls of calibration_data"
    assert "looks: ranges observed on 2 calls of calibration_data" in str(report)


def test_without_calibration_data_the_example_inputs_are_observed() -> None:
    looks, seen = looker()
    report = optimize(net(), [looks], example_inputs=[(X,), (X * 8,), (X * 64,)]).report
    assert seen[0]["x"] == range_of(torch.cat([X, X * 8, X * 64]))
    assert report.steps[0].ranges == "3 calls of the example inputs"
    assert optimize(net(), [looks], example_inputs=X).report.steps[0].ranges == "1 call of the example inputs"


@pytest.mark.parametrize("effect", NUMERIC_EFFECTS)
def test_what_a_pass_does_to_numbers_does_not_matter(effect) -> None:
    looks, seen = looker(effect)
    report = optimize(net(), [looks], example_inputs=X, calibration_data=[X]).report
    assert seen[0]["x"] == range_of(X) and report.steps[0].ranges == "1 call of calibration_data"


def test_where_no_pass_needs_ranges_the_report_says_that_the_data_was_not_used() -> None:
    report = optimize(net(), ["fuse_conv_bn"], example_inputs=X, calibration_data=[X]).report
    assert report.steps[0].ranges == ""
    assert "calibration_data was not used" in str(report)
    report = optimize(net(), [looker()[0]], example_inputs=X, calibration_data=[X]).report
    assert "calibration_data was not used" not in str(report)


def test_what_is_observed_is_the_graph_that_the_pass_is_given() -> None:
    looks, seen = looker()
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(4, 2)).eval()
    optimize(model, [looks, "remove_dropout", looks.with_options(mode="b")], example_inputs=X, calibration_data=[X])
    before, after = seen
    assert set(after) < set(before) and not any("dropout" in name for name in after)


def test_any_iterable_is_read_once() -> None:
    looks, seen = looker()
    optimize(net(), [looks, looks], example_inputs=X, calibration_data=(X * i for i in range(1, 4)))
    assert seen[0]["x"] == seen[1]["x"] == range_of(torch.cat([X, X * 2, X * 3]))


def test_keyword_arguments_of_the_example_go_with_each_call() -> None:
    looks, seen = looker()
    shift = torch.full((2, 3), 5.0)
    optimize(
        net(), [looks], example_inputs=X, example_kwargs={"scale": 2.0, "shift": shift}, calibration_data=[X, X * 2],
    )  # fmt: skip
    assert seen[0]["shift"] == range_of(shift) + range_of(shift)


class ByKeyword(nn.Module):
    def forward(self, *, input_ids: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        y = input_ids.relu() * scale
        return y if mask is None else y + mask


def test_a_dict_is_keyword_arguments_that_go_before_those_of_the_example() -> None:
    looks, seen = looker()
    example = {"input_ids": X, "mask": X * 7, "scale": 2.0}
    calls = [{"input_ids": X * 10}, UserDict({"mask": X * 100, "input_ids": X * 1000})]
    optimize(ByKeyword().eval(), [looks], example_kwargs=example, calibration_data=calls)
    assert seen[0]["input_ids"] == range_of(X * 10) + range_of(X * 1000)
    assert seen[0]["mask"] == range_of(X * 7) + range_of(X * 100), "the example's stands in for what a call does not have"
    with pytest.raises(InputError, match=r"calibration_data\[0\] does not fit the example inputs: .*'scale' was 2.0"):
        optimize(ByKeyword().eval(), [looks], example_kwargs=example, calibration_data=[{"scale": 3.0}])
    with pytest.raises(InputError, match=r"calibration_data\[1\] does not fit the example inputs: .*unexpected .*'ids'"):
        optimize(ByKeyword().eval(), [looks], example_kwargs=example, calibration_data=[{}, {"ids": X}])
    with pytest.raises(InputError, match=r"calibration_data\[0\] does not fit the example inputs: .*positional"):
        optimize(ByKeyword().eval(), [looks], example_kwargs=example, calibration_data=[X])


def test_a_dict_may_name_what_the_example_gives_by_position() -> None:
    looks, seen = looker()
    optimize(net(), [looks], example_inputs=X, calibration_data=[{"x": X * 10}])
    assert seen[0]["x"] == range_of(X * 10)


class TakesDict(nn.Module):
    def forward(self, batch: dict[str, Tensor], shift: Tensor) -> Tensor:
        return batch["x"].relu() + shift


def test_a_dict_is_one_argument_where_the_example_has_a_dict_there() -> None:
    looks, seen = looker()
    options = {"example_inputs": {"x": X}, "example_kwargs": {"shift": X}}
    optimize(TakesDict().eval(), [looks], **options, calibration_data=[{"x": X * 10}, ({"x": X * 20},)])
    (x,) = [r for name, r in seen[0].items() if "x" in name.split("_")]
    assert x == range_of(X * 10) + range_of(X * 20)


def test_a_data_loader_gives_lists_of_arguments() -> None:
    looks, seen = looker()
    data = TensorDataset(torch.ones(4, 4) * 10, torch.ones(4, 3))
    options = {"example_inputs": (X, 1.0, torch.zeros(2, 3))}
    loader = [[x, 1.0, shift] for x, shift in DataLoader(data, batch_size=2)]
    optimize(net(), [looks], **options, calibration_data=loader)
    assert seen[0]["x"] == range_of(torch.ones(4, 4) * 10)
    optimize(net(), [looks], example_inputs=X, calibration_data=DataLoader(TensorDataset(torch.ones(4, 4)), batch_size=2))
    assert seen[1]["x"] == range_of(torch.ones(4, 4))
    with pytest.raises(InputError, match=r"calibration_data\[0\] does not fit .*input 'x' must be a tensor, got list"):
        optimize(net(), [looks], example_inputs=X, calibration_data=[[[X]]])


def test_sizes_may_differ_where_they_are_dynamic() -> None:
    looks, seen = looker()
    shapes = {"x": {0: Dim("batch", min=1, max=16)}}
    calls = [torch.ones(3, 4), torch.ones(5, 4)]
    optimize(net(), [looks], example_inputs=X, dynamic_shapes=shapes, calibration_data=calls)
    assert seen[0]["x"] == Range({1: 32}, 1.0, 1.0)
    with pytest.raises(InputError, match=r"calibration_data\[1\] does not fit the example inputs: .*must be from 1 to 16"):
        optimize(net(), [looks], example_inputs=X, dynamic_shapes=shapes, calibration_data=[X, torch.ones(17, 4)])


class EvenOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] // 2, 2, 4).relu()


def test_what_capture_found_that_sizes_must_meet_is_checked_too() -> None:
    looks, _ = looker()
    options = {"example_inputs": torch.ones(4, 4), "dynamic_shapes": {"x": {0: Dim("batch", min=2, max=16)}}}
    optimize(EvenOnly().eval(), [looks], **options, calibration_data=[torch.ones(6, 4)])
    with pytest.raises(InputError, match=r"calibration_data\[0\] does not fit the example inputs: the sizes must meet .*batch"):
        optimize(EvenOnly().eval(), [looks], **options, calibration_data=[torch.ones(3, 4)])


def test_random_numbers_are_those_of_the_models_own_run_and_nothing_is_left_behind() -> None:
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x.mul_(2) + torch.rand(2, 4) + self.count

    looks, seen = looker()
    model, x, data = Draws().eval(), torch.ones(2, 4), torch.ones(2, 4)
    state = torch.get_rng_state()
    optimize(model, [looks, looks], example_inputs=x, calibration_data=[data, data], frontend="export", engine="aten")
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(data, torch.ones(2, 4)) and model.count.item() == 0
    assert seen[0] == seen[1]
    (drawn,) = [r for name, r in seen[0].items() if name.startswith("rand")]
    assert all(count % 2 == 0 for count in drawn.exponents.values()), "both calls drew the same"


# -- calls that mislead -------------------------------------------------------------------------------------------------


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


def test_a_call_that_gives_nan_is_an_error_that_names_it() -> None:
    looks, seen = looker()
    with pytest.raises(InputError, match=r"the model gives NaN on calibration_data\[1\].*leave this call out"):
        optimize(Log().eval(), [looks], example_inputs=X, calibration_data=[X, -X])
    optimize(Log().eval(), [looks], example_inputs=X, calibration_data=[X * 0])
    assert seen[-1]["log"].nonfinite, "an infinite output is a magnitude like any other"


def test_a_model_that_gives_nan_on_the_examples_may_give_it_on_calibration_data() -> None:
    looks, seen = looker()
    optimize(Log().eval(), [looks], example_inputs=-X, calibration_data=[-X])
    optimize(Log().eval(), [looks], example_inputs=[(X,), (-X,)])
    assert len(seen) == 2 and seen[0]["log"].nonfinite


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).relu()


@pytest.mark.parametrize("verify", ["each", "off"])
def test_a_call_that_fails_is_an_error_that_names_it(verify) -> None:
    looks, _ = looker()
    ids = torch.tensor([0, 4])
    with pytest.raises(InputError, match=r"the model fails on calibration_data\[2\]: IndexError: .*range"):
        optimize(Looks().eval(), [looks], example_inputs=ids, calibration_data=[ids, ids, ids + 1], verify=verify)


def test_a_graph_that_fails_on_the_examples_is_not_blamed_on_calibration_data() -> None:
    looks, _ = looker()
    ids = torch.tensor([0, 4])
    run = wrap(run_pass, [observed([Example({}, [ids + 1], [])], None)])
    with pytest.raises(IndexError):
        run(Step(1, looks), captured(Looks().eval(), ids))


def test_values_inside_of_branches_are_observed() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            if bool(y.sum() > 0):
                y = y.exp()
            return y * 2

    looks, seen = looker()
    optimize(Branch().eval(), [looks], example_inputs=X, frontend="script", calibration_data=[X])
    assert all(ranges == seen[0] for ranges in seen) and len(seen) == 3, "bodies are given the ranges around them"
    (inside,) = (r for name, r in seen[0].items() if name.endswith("exp"))
    assert math.isclose(inside.largest, math.exp(2), rel_tol=1e-6)
    assert any(math.isclose(r.largest, 2 * math.exp(2), rel_tol=1e-6) for r in seen[0].values())
