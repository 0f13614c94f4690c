"""Choices by measurement: what is measured, how often, what wins, how it is recorded, replayed, and told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ir_tools.emit.torch_jit import ScriptModule
from ir_tools.ir import Program
from ir_tools.ir.dialect import DIALECT_ONLY, overload_name
from ir_tools.rewrite import Call, Journal
from passes import CATALOGUE, DEFAULT, OptionError, load, optimize
from passes.errors import ModelFileError
from passes.lower.variants.onednn import Product, forms_of, signature, timed_forms
from passes.tune import tuning_record as choices
from passes.tune.tuning_record import Choice, Choices
from tests.check import captured, outputs_of, relative_error, rewritten

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")

lower_onednn = CATALOGUE["lower_onednn"]


class Net(nn.Module):
    """Convolutions with residuals that die and that stay, activations of several kinds, equal sites, linears."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.stem(x))
        for conv in self.convs:
            y = F.relu(conv(y) + y.exp().reciprocal())
        kept = y.sigmoid()
        y = F.silu(self.depthwise(y)) + F.hardswish(self.depthwise(y) + kept)
        z = F.gelu(self.first(y.amax((2, 3))))
        return self.third(self.second(z) + z), kept


def net() -> tuple[nn.Module, Tensor]:
    return Net().eval(), torch.randn(2, 3, 9, 9)


def fused_net(dtype: torch.dtype = torch.float32) -> tuple[Program, Tensor]:
    model, x = net()
    return CATALOGUE["fuse_conv_relu"](captured(model.to(dtype), x.to(dtype))), x.to(dtype)


def winner(place: int, calls: list[int] | None = None) -> Callable[..., dict[str, list[float]]]:
    """A measurement in which the form at `place` (the last one, where there are fewer) takes no time."""

    def measured(forms: Mapping[str, Any], least_rounds: int = 1) -> dict[str, list[float]]:
        if calls is not None:
            calls.append(len(forms))
        return {name: [float(i != min(place, len(forms) - 1))] for i, name in enumerate(forms)}

    return measured


def never(forms: Mapping[str, Any]) -> dict[str, list[float]]:
    raise AssertionError("nothing was to be measured")


def graph(program: Program) -> list[str]:
    return [f"{node.name} {node.target} {node.args} {node.kwargs}" for node in program.all_calls]


# -- what wins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "form"),
    [
        ((1.0, 2.0, 3.0), "fused"),
        ((1.0, 0.91, 0.95), "fused"),  # within a tenth: noise
        ((1.0, 0.9, 0.95), "apart"),
        ((1.0, 0.5, 0.4), "plain"),
        ((1.0, 1.0, 1.0), "fused"),
    ],
)
def test_the_favourite_stays_unless_another_is_faster_by_a_tenth(seconds: tuple[float, ...], form: str) -> None:
    choice = choices.choice_from({name: [s] * 3 for name, s in zip(("fused", "apart", "plain"), seconds)})
    assert choice.form == form and choice.is_favourite == (form == "fused")


def test_a_favourite_that_lost_time_to_others_stays() -> None:
    """Its median is worse, but its fastest call is not: somebody else had the machine."""
    assert choices.choice_from({"fused": [1.0, 5.0, 5.0], "apart": [1.0, 1.0, 1.0]}).form == "fused"


@pytest.mark.parametrize(("second", "form"), [((1.0, 0.95), "fused"), ((1.0, 0.5), "apart")])
def test_a_favourite_that_loses_is_measured_again(monkeypatch: pytest.MonkeyPatch, second: tuple, form: str) -> None:
    figures = [{"fused": [1.0], "apart": [0.1]}, {"fused": [second[0]], "apart": [second[1]]}]
    monkeypatch.setattr(choices, "measure", lambda forms, least_rounds=1: figures.pop(0))
    choice = choices.fastest({})
    assert choice.form == form and not figures and tuple(choice.seconds.values()) == second


def test_a_measurement_is_a_few_calls_of_each_form() -> None:
    calls: list[str] = []
    times = choices.measure({name: lambda name=name: calls.append(name) for name in ("fused", "apart")})
    assert list(times) == ["fused", "apart"] and min(times["fused"]) > 0
    assert 2 < calls.count("fused") == calls.count("apart") <= 26


def test_slow_forms_are_called_twice() -> None:
    calls: list[str] = []

    def slow(name: str) -> None:
        calls.append(name)
        time.sleep(0.01)

    choices.measure({name: lambda name=name: slow(name) for name in ("fused", "apart")})
    assert calls == ["fused", "apart"] * 2


def test_measuring_leaves_the_random_numbers_alone() -> None:
    program, _ = fused_net()
    before = torch.get_rng_state()
    lower_onednn(program)
    assert torch.equal(before, torch.get_rng_state())


# -- what is measured ---------------------------------------------------------------------------------------------------


def products(program: Program) -> list[Product]:
    return [Product.of(Call(n)) for n in program.calls if "conv" in str(n.target) or "linear" in str(n.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forms_that_are_timed_compute_the_same(dtype: torch.dtype) -> None:
    program, _ = fused_net(dtype)
    found = products(program)
    assert {tuple(forms_of(p)) for p in found} == {("fused", "apart", "plain"), ("packed", "plain")}
    assert {p.spent for p in found if p.residual is not None} == {True, False}
    for product in found:
        # New tensors for each form: a fused one may write into its residual.
        results = [timed_forms(product)[name]() for name in forms_of(product)]
        for result in results:
            assert result.stride() == results[-1].stride()
            assert relative_error(results[-1:], [result]) < (1e-5 if dtype is torch.float32 else 2e-2)


def test_a_signature_holds_what_speed_depends_on() -> None:
    program, _ = fused_net()
    product = next(p for p in products(program) if p.residual is not None and p.sizes is not None and p.spent)
    assert signature(product) == (
        "conv2d float32 2x8x9x9 channels last, weight 8x8x3x3 and bias, padding 1x1, stride 1x1, dilation 1x1, "
        f"+ residual in place, relu, {torch.get_num_threads()} threads"
    )
    others = [
        replace(product, b=None),
        replace(product, residual=None),
        replace(product, spent=False),
        replace(product, act="silu"),
        replace(product, act="leaky_relu", act_args=[0.1]),
        replace(product, act="leaky_relu", act_args=[0.2]),
        replace(product, groups=2),
        *[replace(product, sizes=tuple([2, 2] if i == k else [1, 1] for i in range(3))) for k in range(3)],
        *[p for p in products(program) if p.sizes is None or p.groups > 1],
        products(program)[0],  # its x is an input, whose layout is not channels last
        products(fused_net(torch.bfloat16)[0])[2],
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with_more_threads = signature(product)
    finally:
        torch.set_num_threads(threads)
    assert len({signature(product), with_more_threads, *map(signature, others)}) == 2 + len(others)


def test_equal_signatures_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(choices, "measure", winner(0, calls))
    program, x = fused_net()
    journal = Journal()
    lower_onednn(program, journal=journal)
    assert len(calls) == len(journal.choices.measured) == len(journal.choices.table) < len(journal.rewrites)
    assert not journal.refusals and not journal.choices.unusual


class Clock:
    """A clock that a measurement sets forward by `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        return self.now

    def measured(self, forms: Mapping[str, Any], least_rounds: int = 1) -> dict[str, list[float]]:
        self.now += self.step
        return {name: [float(name != "plain")] for name in forms}


def test_when_the_budget_is_spent_the_rest_takes_its_favourite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = net()
    clock = Clock(choices.BUDGET / 4)  # a favourite that loses is measured twice: this is enough for two signatures
    monkeypatch.setattr(choices, "perf_counter", clock)
    monkeypatch.setattr(choices, "measure", clock.measured)
    report = optimize(model, example_inputs=x).report
    made, reasons = report.choices, [refusal.reason for refusal in report.steps[-1].refusals]
    assert len(made.measured) == len(made.table) == len(made.unusual) == 2 and made.spent == pytest.approx(choices.BUDGET)
    count = len(made.unmeasured)
    said = f"{count} signatures not measured: the budget of 2 s was spent"
    assert count > 2 and made.unmeasured.isdisjoint(made.table) and len(made.asked) == 2 + count
    assert report.notes == [said] and said in str(report)
    assert str(made).endswith(f"2 in another form, being faster so; {said}")
    assert reasons and all(reason.startswith("plain is faster here") for reason in reasons)  # none about the unmeasured

    made.save(tmp_path / "choices.json")
    again = optimize(model, example_inputs=x, choices=tmp_path / "choices.json").report.choices  # with a budget of its own
    assert len(again.replayed) == len(again.measured) == 2 and len(again.unmeasured) == count - 2
    monkeypatch.setattr(choices, "BUDGET", 0.0)
    monkeypatch.setattr(choices, "measure", never)
    fast = optimize(model, example_inputs=x)
    assert len(fast.report.choices.unmeasured) == 2 + count and not fast.report.choices.table
    assert graph(fast.program) == graph(optimize(model, [*DEFAULT, "lower_onednn:choose=fused"], example_inputs=x).program)


# -- what is chosen is built --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_form_that_wins_is_built(monkeypatch: pytest.MonkeyPatch, place: int, dtype: torch.dtype) -> None:
    program, x = fused_net(dtype)
    monkeypatch.setattr(choices, "measure", winner(place))
    after, journal = rewritten(lower_onednn, program, x)  # with a second run, which finds nothing more to do
    ops = {overload_name(node.target) for node in after.calls}
    fused = {"mkldnn::_convolution_pointwise_.binary", "mkldnn::_linear_pointwise.binary"}
    assert fused <= ops if place == 0 else not fused & ops
    assert ("aten::relu" in ops) == (place > 0)
    assert ("mkldnn::_convolution_pointwise" in ops) == (place < 2) and ("aten::conv2d" in ops) == (place == 2)
    assert not {node.target for node in after.calls} & DIALECT_ONLY
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) < (1e-5 if dtype is torch.float32 else 3e-2)
    assert len(journal.refusals) == (len(journal.rewrites) if place else 0)


def test_sites_are_the_same_whatever_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = fused_net()
    found = []
    for place in range(3):
        monkeypatch.setattr(choices, "measure", winner(place))
        _, journal = rewritten(lower_onednn, program, x)
        found.append([rewrite.site for rewrite in journal.rewrites])
        (first, *rest) = found[-1]
        after, _ = rewritten(lower_onednn, program, x, skip={first})
        assert first.split("@")[1] in [node.name for node in after.calls]
    assert found[0] == found[1] == found[2] and len(found[0]) == 9


def test_choose_fused_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x = fused_net()
    monkeypatch.setattr(choices, "measure", winner(0))
    measured = lower_onednn(program)
    monkeypatch.setattr(choices, "measure", never)
    after, journal = rewritten(lower_onednn.with_options(choose="fused"), program, x)
    assert journal.choices is None and graph(after) == graph(measured)


# -- the record ---------------------------------------------------------------------------------------------------------


def test_a_recorded_choice_gives_the_same_graph_however_the_clock_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "choices.json"
    places = iter(range(1000))
    monkeypatch.setattr(choices, "measure", lambda forms, least_rounds=1: winner(next(places) // 2 % 3)(forms))
    first = optimize(model, example_inputs=x)
    assert 0 < len(first.report.choices.unusual) < len(first.report.choices.table)
    first.report.choices.save(path)
    monkeypatch.setattr(choices, "measure", never)
    again = optimize(model, example_inputs=x, choices=path)
    assert graph(again.program) == graph(first.program)
    assert again.report.choices.replayed == first.report.choices.measured and not again.report.choices.measured
    assert again.report.choices.to_dict() == first.report.choices.to_dict()
    by_option = optimize(model, [*DEFAULT, f"lower_onednn:choices={path}"], example_inputs=x)
    assert graph(by_option.program) == graph(first.program)
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)


def test_what_a_file_lacks_is_measured_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "choices.json"
    Choices().save(path)
    monkeypatch.setattr(choices, "measure", winner(0))
    report = optimize(model, example_inputs=x, choices=path).report
    count = len(report.choices.table)
    assert f"{path} lacks {count} signatures of this model, which were measured" in report.notes
    report.choices.save(path)
    unknown = json.loads(path.read_text().replace('"fused"', '"melted"'))  # a form of some other version
    path.write_text(json.dumps(unknown))
    report = optimize(model, example_inputs=x, choices=path).report
    assert 0 < len(report.choices.measured) < count and report.choices.replayed


def test_a_record_of_another_machine_is_used_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = net()
    monkeypatch.setattr(choices, "measure", winner(1))
    first = optimize(model, example_inputs=x)
    path = tmp_path / "choices.json"
    first.report.choices.save(path)
    monkeypatch.setattr(choices, "measure", never)
    assert optimize(model, example_inputs=x, choices=path).report.notes == []
    monkeypatch.setattr(choices, "machine", lambda: "torch 9.9, AVX9")
    again = optimize(model, example_inputs=x, choices=path)
    assert graph(again.program) == graph(first.program)
    (note,) = again.report.notes
    assert "recorded on another machine" in note and "torch 9.9, AVX9" in note and torch.__version__ in note


ROW = {"form": "fused", "seconds": {"fused": 1e-3, "plain": 2e-3}, "machine": "torch 2.13.0, AVX512"}
MALFORMED: dict[str, Any] = {
    "no JSON": "{",
    "a list": [],
    "no format": {"choices": {}},
    "another format": {"format": 2, "choices": {}},
    "no choices": {"format": 1},
    "a row that is no table": {"format": 1, "choices": {"conv2d": "fused"}},
    "a form without figures": {"format": 1, "choices": {"conv2d": {**ROW, "form": "melted"}}},
    "figures that are no numbers": {"format": 1, "choices": {"conv2d": {**ROW, "seconds": {"fused": "fast"}}}},
    "figures that are negative": {"format": 1, "choices": {"conv2d": {**ROW, "seconds": {"fused": -1.0}}}},
    "no machine": {"format": 1, "choices": {"conv2d": {k: v for k, v in ROW.items() if k != "machine"}}},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(MALFORMED[case] if isinstance(MALFORMED[case], str) else json.dumps(MALFORMED[case]))
    with pytest.raises(OptionError, match=r"choices\.json.*(choices\.save)"):
        optimize(nn.ReLU().eval(), example_inputs=torch.ones(1), choices=path)


def test_a_good_row_is_read(tmp_path: Path) -> None:
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"format": 1, "choices": {"conv2d": ROW}}))
    assert Choices.load(path).table == {"conv2d": Choice("fused", ROW["seconds"], ROW["machine"])}


def test_other_wrong_choices_are_refused(tmp_path: Path) -> None:
    model, x = net()
    with pytest.raises(OptionError, match=r"none\.json' cannot be read: No such file"):
        optimize(model, example_inputs=x, choices=tmp_path / "none.json")
    with pytest.raises(OptionError, match=r"must be the path of a file that `choices\.save` wrote, got dict"):
        optimize(model, example_inputs=x, choices={})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="choose must be one of 'measured', 'fused', got 'apart'"):
        optimize(model, ["lower_onednn:choose=apart"], example_inputs=x)
    path = tmp_path / "choices.json"
    Choices().save(path)
    with pytest.raises(OptionError, match="choose=fused replays nothing"):
        optimize(model, ["lower_onednn:choose=fused"], example_inputs=x, choices=path)
    with pytest.raises(ModelFileError, match="cannot be written: No such file"):
        Choices().save(tmp_path / "none" / "choices.json")


def test_an_engine_that_chooses_nothing_says_so(tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "choices.json"
    Choices().save(path)
    report = optimize(model, example_inputs=x, engine="aten", choices=path).report
    assert report.choices is None and report.to_dict()["choices"] is None
    assert any("was not used: only lower_onednn chooses by measurement" in note for note in report.notes)


# -- the report and the file --------------------------------------------------------------------------------------------


def test_the_report_tells_what_was_chosen_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net()
    times = {"fused": [3.1e-4], "packed": [2.2e-4], "apart": [2.2e-4], "plain": [2.2e-4]}
    monkeypatch.setattr(choices, "measure", lambda forms, least_rounds=1: {name: times[name] for name in forms})
    report = optimize(model, example_inputs=x).report
    count, unusual = len(report.choices.table), len(report.choices.unusual)
    assert 0 < unusual < count
    said = f"choices    {count} signatures measured, 0 replayed; {unusual} in another form, being faster so"
    assert said in str(report)
    (reason,) = {refusal.reason for refusal in report.steps[-1].refusals}
    assert reason == "apart is faster here: 0.31 ms fused, 0.22 ms apart, 0.22 ms plain"
    told = json.loads(json.dumps(report.to_dict()))["choices"]
    assert Choices.from_dict(told).table == report.choices.table


def targets(scripted: ScriptModule) -> set[str]:
    """The kinds of all nodes of a TorchScript module, calls inlined, blocks included."""
    graph = scripted.inlined_graph  # its nodes live as long as it does
    found, blocks = set(), [graph]
    while blocks:
        for node in blocks.pop().nodes():
            found.add(node.kind())
            blocks += node.blocks()
    return found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_op_of_the_dialect_reaches_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: int) -> None:
    model, x = net()
    monkeypatch.setattr(choices, "measure", winner(place))
    fast = optimize(model, example_inputs=x)
    fast.save(tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    kinds = targets(loaded.scripted)
    assert "aten::amax" in kinds and {kind.split("::")[0] for kind in kinds} <= {"prim", "aten", "mkldnn"}
    assert Choices.from_dict(loaded.manifest["choices"]).table == fast.report.choices.table
    torch.testing.assert_close(fast(x), model(x))


def test_the_command_line_writes_choices_and_replays_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from passes.cli.main import app

    monkeypatch.chdir(tmp_path)
    traced = torch.jit.trace(net()[0], net()[1])
    traced.save("net.pt")
    command = ["optimize", "net.pt", "--input", "2x3x9x9", "--no-bench", "--choices", "new/choices.json"]
    monkeypatch.setattr(choices, "measure", winner(1))
    said = CliRunner().invoke(app, command).output
    assert "written to new/choices.json" in said and "0 replayed" in said
    written = Path("new/choices.json").read_text()
    monkeypatch.setattr(choices, "measure", never)
    said = CliRunner().invoke(app, command).output
    assert "0 signatures measured" in said and "written to" not in said
    assert Path("new/choices.json").read_text() == written
    said = CliRunner().invoke(app, [*command[:-1], "other.json", "--engine", "aten"]).output
    assert "none were measured: other.json is not written" in said and not Path("other.json").exists()


class SizesOfTheRun(nn.Module):
    """How many rows the linear gets, only the values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        rows = x
        for _ in range(int(n)):
            rows = torch.cat([rows, x])
        return F.gelu(self.linear(rows))


def test_what_has_no_size_before_the_run_is_fused_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "measure", never)
    model, x, n = SizesOfTheRun().eval(), torch.randn(2, 4), torch.tensor(2)
    program = CATALOGUE["fuse_conv_relu"](captured(torch.jit.script(model), x, n, frontend="script"))
    after, journal = rewritten(lower_onednn, program, x, n)
    assert "mkldnn::_linear_pointwise" in [overload_name(node.target) for node in after.all_calls] and not journal.refusals
    torch.testing.assert_close(outputs_of(after, x, torch.tensor(3))[0], model(x, torch.tensor(3)))
