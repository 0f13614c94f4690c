"""Tuning records: what is measured, how often, which variant wins, how it is recorded, replayed, and reported."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
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
from ir_tools.rewrite import Artifacts, Call, RewriteLog
from passes import CATALOGUE, DEFAULT, OptionError, load, optimize
from passes.errors import ModelFileError
from passes.lower.variants.onednn import LAYER_KERNELS, Layer, variants_of, workload_key
from passes.tune.tuning_record import BUDGET, TuningRecord, TuningRecords, fastest, measure, record_of
from tests.check import captured, graph_lines, outputs_of, relative_error, rewritten
from tests.timers import Times, UseTimer, lowering_with, never, winner

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


def fused_net(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.channels_last) -> tuple[Program, Tensor]:
    model, x = net()
    x = x.to(dtype).contiguous(memory_format=layout)
    return CATALOGUE["fuse_conv_relu"](captured(model.to(dtype), x)), x


# -- what wins ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "variant"),
    [
        ((1.0, 2.0, 3.0), "fused"),
        ((1.0, 0.91, 0.95), "fused"),  # within a tenth: noise
        ((1.0, 0.9, 0.95), "apart"),
        ((1.0, 0.5, 0.4), "plain"),
        ((1.0, 1.0, 1.0), "fused"),
    ],
)
def test_the_default_stays_unless_another_is_faster_by_a_tenth(seconds: tuple[float, ...], variant: str) -> None:
    record = record_of({name: [s] * 3 for name, s in zip(("fused", "apart", "plain"), seconds)})
    assert record.variant == variant and record.is_default == (variant == "fused")


def test_a_default_that_lost_time_to_others_stays() -> None:
    """Its median is worse, but its fastest call is not: another process had the machine."""
    assert record_of({"fused": [1.0, 5.0, 5.0], "apart": [1.0, 1.0, 1.0]}).variant == "fused"


@pytest.mark.parametrize(("second", "variant"), [((1.0, 0.95), "fused"), ((1.0, 0.5), "apart")])
def test_a_default_that_loses_is_measured_again(use_timer: UseTimer, second: tuple, variant: str) -> None:
    figures = [{"fused": [1.0], "apart": [0.1]}, {"fused": [second[0]], "apart": [second[1]]}]
    use_timer(lambda calls, **given: figures.pop(0))
    record = fastest({}, "here")
    assert record.variant == variant and not figures and tuple(record.seconds.values()) == second
    assert record.machine == "here"


def test_a_measurement_is_a_few_calls_of_each_variant() -> None:
    calls: list[str] = []
    times = measure({name: lambda name=name: calls.append(name) for name in ("fused", "apart")})
    assert list(times) == ["fused", "apart"] and min(times["fused"]) > 0
    assert 2 < calls.count("fused") == calls.count("apart") <= 26


def test_slow_variants_are_called_twice() -> None:
    calls: list[str] = []

    def slow(name: str) -> None:
        calls.append(name)
        time.sleep(0.01)

    measure({name: lambda name=name: slow(name) for name in ("fused", "apart")})
    assert calls == ["fused", "apart"] * 2


def test_measuring_leaves_the_random_numbers_alone() -> None:
    program, _ = fused_net()
    before = torch.get_rng_state()
    lower_onednn(program)
    assert torch.equal(before, torch.get_rng_state())


# -- what is measured ---------------------------------------------------------------------------------------------------


def layers(program: Program) -> list[Layer]:
    return [Layer.of(Call(n)) for n in program.calls if "conv" in str(n.target) or "linear" in str(n.target)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_variants_that_are_timed_compute_the_same(dtype: torch.dtype) -> None:
    program, _ = fused_net(dtype)
    found = layers(program)
    assert {tuple(variants_of(p)) for p in found} == {("fused", "apart", "plain"), ("packed", "plain")}
    assert {p.spent for p in found if p.residual is not None} == {True, False}
    for layer in found:
        # New tensors for each variant: a fused one may write into its residual.
        results = [LAYER_KERNELS.timed_variants(layer)[name]() for name in variants_of(layer)]
        for result in results:
            assert result.stride() == results[-1].stride()
            assert relative_error(results[-1:], [result]) < (1e-5 if dtype is torch.float32 else 2e-2)


def test_a_workload_key_holds_what_speed_depends_on() -> None:
    program, _ = fused_net()
    layer = next(p for p in layers(program) if p.residual is not None and p.sizes is not None and p.spent)
    assert workload_key(layer) == (
        "conv2d float32 2x8x9x9 channels last, weight 8x8x3x3 and bias, padding 1x1, stride 1x1, dilation 1x1, "
        f"+ residual in place, relu, {torch.get_num_threads()} threads"
    )
    others = [
        replace(layer, b=None),
        replace(layer, residual=None),
        replace(layer, spent=False),
        replace(layer, act="silu"),
        replace(layer, act="leaky_relu", act_args=[0.1]),
        replace(layer, act="leaky_relu", act_args=[0.2]),
        replace(layer, groups=2),
        *[replace(layer, sizes=tuple([2, 2] if i == k else [1, 1] for i in range(3))) for k in range(3)],
        *[p for p in layers(program) if p.sizes is None or p.groups > 1],
        layers(fused_net(layout=torch.contiguous_format)[0])[2],
        layers(fused_net(torch.bfloat16)[0])[2],
    ]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with_more_threads = workload_key(layer)
    finally:
        torch.set_num_threads(threads)
    assert len({workload_key(layer), with_more_threads, *map(workload_key, others)}) == 2 + len(others)


def test_equal_workloads_are_measured_once(use_timer: UseTimer) -> None:
    counts: list[int] = []
    use_timer(winner(0, counts))
    program, x = fused_net()
    log, artifacts = RewriteLog(), Artifacts()
    lower_onednn(program, log=log, artifacts=artifacts)
    records = artifacts[TuningRecords]
    assert len(counts) == len(records.measured) == len(records.table) < len(log.rewrites)
    assert not log.refusals and not records.not_default


class Clock:
    """A clock that a measurement sets forward by `step` seconds."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 100.0, step

    def __call__(self) -> float:
        return self.now

    def timer(self, calls: Mapping[str, Any], **given: Any) -> Times:
        self.now += self.step
        return {name: [float(name != "plain")] for name in calls}


def test_when_the_budget_is_spent_the_rest_takes_its_default(use_timer: UseTimer, tmp_path: Path) -> None:
    model, x = net()
    clock = Clock(BUDGET / 4)  # a default that loses is measured twice: this is enough for two workloads
    use_timer(clock.timer)
    report = optimize(model, [*DEFAULT, lowering_with(TuningRecords(clock=clock))], example_inputs=x).report
    made, reasons = report.tuning_records, [refusal.reason for refusal in report.steps[-1].refusals]
    assert len(made.measured) == len(made.table) == len(made.not_default) == 2 and made.spent == pytest.approx(BUDGET)
    count = len(made.unmeasured)
    said = f"{count} workloads not measured: the budget of 2 s was spent"
    assert count > 2 and made.unmeasured.isdisjoint(made.table) and len(made.requested) == 2 + count
    assert report.notes == [said] and said in str(report)
    assert str(made).endswith(f"2 with a faster variant than the default; {said}")
    assert reasons  # none about the unmeasured:
    assert all(reason.startswith("the variant plain is faster here") for reason in reasons)

    made.save(tmp_path / "tuning.json")
    replayed = replace(TuningRecords.load(tmp_path / "tuning.json"), clock=clock)  # with a budget of its own
    again = optimize(model, [*DEFAULT, lowering_with(replayed)], example_inputs=x).report.tuning_records
    assert len(again.replayed) == len(again.measured) == 2 and len(again.unmeasured) == count - 2
    use_timer(never)
    fast = optimize(model, [*DEFAULT, lowering_with(TuningRecords(budget=0.0))], example_inputs=x)
    assert len(fast.report.tuning_records.unmeasured) == 2 + count and not fast.report.tuning_records.table
    unmeasured = optimize(model, [*DEFAULT, "lower_onednn:variant=fused"], example_inputs=x)
    assert graph_lines(fast.program) == graph_lines(unmeasured.program)


# -- the best variant is built ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_the_variant_that_wins_is_built(use_timer: UseTimer, position: int, dtype: torch.dtype) -> None:
    program, x = fused_net(dtype)
    use_timer(winner(position))
    after, log = rewritten(lower_onednn, program, x)  # with a second run, which finds nothing more to do
    ops = {overload_name(node.target) for node in after.calls}
    fused = {"mkldnn::_convolution_pointwise_.binary", "mkldnn::_linear_pointwise.binary"}
    assert fused <= ops if position == 0 else not fused & ops
    assert ("aten::relu" in ops) == (position > 0)
    assert ("mkldnn::_convolution_pointwise" in ops) == (position < 2) and ("aten::conv2d" in ops) == (position == 2)
    assert not {node.target for node in after.calls} & DIALECT_ONLY
    assert relative_error(outputs_of(program, x), outputs_of(after, x)) < (1e-5 if dtype is torch.float32 else 3e-2)
    assert len(log.refusals) == (len(log.rewrites) if position else 0)


def test_sites_are_the_same_whatever_variant_is_built(use_timer: UseTimer) -> None:
    program, x = fused_net()
    found = []
    for position in range(3):
        use_timer(winner(position))
        _, log = rewritten(lower_onednn, program, x)
        found.append([rewrite.site for rewrite in log.rewrites])
        (first, *rest) = found[-1]
        after, _ = rewritten(lower_onednn, program, x, skip={first})
        assert first.split("@")[1] in [node.name for node in after.calls]
    assert found[0] == found[1] == found[2] and len(found[0]) == 9


def test_variant_fused_measures_nothing(use_timer: UseTimer) -> None:
    program, x = fused_net()
    use_timer(winner(0))
    measured = lower_onednn(program)
    use_timer(never)
    artifacts = Artifacts()
    after, _ = rewritten(lower_onednn.with_options(variant="fused"), program, x, artifacts=artifacts)
    assert TuningRecords not in artifacts and graph_lines(after) == graph_lines(measured)


# -- the record ---------------------------------------------------------------------------------------------------------


def test_a_record_gives_the_same_graph_whatever_the_timer_says(use_timer: UseTimer, tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "tuning.json"
    positions = iter(range(1000))
    use_timer(lambda calls, **given: winner(next(positions) // 2 % 3)(calls, **given))
    first = optimize(model, example_inputs=x)
    assert 0 < len(first.report.tuning_records.not_default) < len(first.report.tuning_records.table)
    first.report.tuning_records.save(path)
    use_timer(never)
    again = optimize(model, example_inputs=x, tuning_records=path)
    assert graph_lines(again.program) == graph_lines(first.program)
    replayed, recorded = again.report.tuning_records, first.report.tuning_records
    assert replayed.replayed == recorded.measured and not replayed.measured and replayed.to_dict() == recorded.to_dict()
    by_option = optimize(model, [*DEFAULT, f"lower_onednn:records={path}"], example_inputs=x)
    assert graph_lines(by_option.program) == graph_lines(first.program)
    torch.testing.assert_close(again(x), first(x), rtol=0, atol=0)


def test_what_a_file_lacks_is_measured_and_reported(use_timer: UseTimer, tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "tuning.json"
    TuningRecords().save(path)
    use_timer(winner(0))
    report = optimize(model, example_inputs=x, tuning_records=path).report
    count = len(report.tuning_records.table)
    assert f"{path} lacks {count} workloads of this model, which were measured" in report.notes
    report.tuning_records.save(path)
    unknown = json.loads(path.read_text().replace('"fused"', '"melted"'))  # a variant of some other version
    path.write_text(json.dumps(unknown))
    report = optimize(model, example_inputs=x, tuning_records=path).report
    assert 0 < len(report.tuning_records.measured) < count and report.tuning_records.replayed


def test_a_record_of_another_machine_is_used_and_reported(use_timer: UseTimer, tmp_path: Path) -> None:
    model, x = net()
    use_timer(winner(1))
    first = optimize(model, example_inputs=x)
    path = tmp_path / "tuning.json"
    first.report.tuning_records.save(path)
    use_timer(never)
    assert optimize(model, example_inputs=x, tuning_records=path).report.notes == []
    elsewhere = replace(TuningRecords.load(path), machine="torch 9.9, AVX9")
    again = optimize(model, [*DEFAULT, lowering_with(elsewhere)], example_inputs=x)
    assert graph_lines(again.program) == graph_lines(first.program)
    (note,) = again.report.notes
    assert "tuning records of another machine" in note and "torch 9.9, AVX9" in note and torch.__version__ in note


ROW = {"form": "fused", "seconds": {"fused": 1e-3, "plain": 2e-3}, "machine": "torch 2.13.0, AVX512"}
MALFORMED: dict[str, Any] = {
    "no JSON": "{",
    "a list": [],
    "no format": {"choices": {}},
    "another format": {"format": 2, "choices": {}},
    "no choices": {"format": 1},
    "a row that is no table": {"format": 1, "choices": {"conv2d": "fused"}},
    "a variant without figures": {"format": 1, "choices": {"conv2d": {**ROW, "form": "melted"}}},
    "figures that are no numbers": {"format": 1, "choices": {"conv2d": {**ROW, "seconds": {"fused": "fast"}}}},
    "figures that are negative": {"format": 1, "choices": {"conv2d": {**ROW, "seconds": {"fused": -1.0}}}},
    "no machine": {"format": 1, "choices": {"conv2d": {k: v for k, v in ROW.items() if k != "machine"}}},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused(case: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(MALFORMED[case] if isinstance(MALFORMED[case], str) else json.dumps(MALFORMED[case]))
    with pytest.raises(OptionError, match=r"tuning\.json.*(tuning_records\.save)"):
        optimize(nn.ReLU().eval(), example_inputs=torch.ones(1), tuning_records=path)


def test_a_good_row_is_read_and_written_back_byte_by_byte(tmp_path: Path) -> None:
    """The file is that of earlier versions, in which records were choices and variants forms."""
    path = tmp_path / "tuning.json"
    path.write_text(written := json.dumps({"format": 1, "choices": {"conv2d": ROW}}, indent=1) + "\n")
    records = TuningRecords.load(path)
    assert records.table == {"conv2d": TuningRecord("fused", ROW["seconds"], ROW["machine"])}
    records.save(path)
    assert path.read_text() == written


def test_other_wrong_records_are_refused(tmp_path: Path) -> None:
    model, x = net()
    with pytest.raises(OptionError, match=r"none\.json' cannot be read: No such file"):
        optimize(model, example_inputs=x, tuning_records=tmp_path / "none.json")
    with pytest.raises(OptionError, match=r"must be the path of a file that `tuning_records\.save` wrote, got dict"):
        optimize(model, example_inputs=x, tuning_records={})  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="variant must be one of 'measured', 'fused', got 'apart'"):
        optimize(model, ["lower_onednn:variant=apart"], example_inputs=x)
    path = tmp_path / "tuning.json"
    TuningRecords().save(path)
    with pytest.raises(OptionError, match="variant=fused replays nothing"):
        optimize(model, ["lower_onednn:variant=fused"], example_inputs=x, tuning_records=path)
    with pytest.raises(ModelFileError, match="cannot be written: No such file"):
        TuningRecords().save(tmp_path / "none" / "tuning.json")


def test_an_engine_that_measures_nothing_says_so(tmp_path: Path) -> None:
    model, x = net()
    path = tmp_path / "tuning.json"
    TuningRecords().save(path)
    report = optimize(model, example_inputs=x, engine="aten", tuning_records=path).report
    assert report.tuning_records is None and report.to_dict()["tuning_records"] is None
    assert any("was not used: the lowering of this engine has no kernel variants" in note for note in report.notes)


# -- the report and the file --------------------------------------------------------------------------------------------


def test_the_report_says_which_variants_are_built_and_why(use_timer: UseTimer) -> None:
    model, x = net()
    times = {"fused": [3.1e-4], "packed": [2.2e-4], "apart": [2.2e-4], "plain": [2.2e-4]}
    use_timer(lambda calls, **given: {name: times[name] for name in calls})
    report = optimize(model, example_inputs=x).report
    count, others = len(report.tuning_records.table), len(report.tuning_records.not_default)
    assert 0 < others < count
    said = f"tuning {count} workloads measured, 0 replayed; {others} with a faster variant than the default"
    assert said in " ".join(str(report).split())
    (reason,) = {refusal.reason for refusal in report.steps[-1].refusals}
    assert reason == "the variant apart is faster here: 0.31 ms fused, 0.22 ms apart, 0.22 ms plain"
    data = json.loads(json.dumps(report.to_dict()))["tuning_records"]
    assert TuningRecords.from_dict(data).table == report.tuning_records.table


def targets(scripted: ScriptModule) -> set[str]:
    """The kinds of all nodes of a TorchScript module, calls inlined, blocks included."""
    graph = scripted.inlined_graph  # its nodes live as long as it does
    found, blocks = set(), [graph]
    while blocks:
        for node in blocks.pop().nodes():
            found.add(node.kind())
            blocks += node.blocks()
    return found


@pytest.mark.parametrize("position", [0, 1, 2])
def test_no_op_of_the_dialect_reaches_the_file(use_timer: UseTimer, tmp_path: Path, position: int) -> None:
    model, x = net()
    use_timer(winner(position))
    fast = optimize(model, example_inputs=x)
    fast.save(tmp_path / "net.pt")
    loaded = load(tmp_path / "net.pt")
    kinds = targets(loaded.scripted)
    assert "aten::amax" in kinds and {kind.split("::")[0] for kind in kinds} <= {"prim", "aten", "mkldnn"}
    assert TuningRecords.from_dict(loaded.manifest["choices"]).table == fast.report.tuning_records.table
    torch.testing.assert_close(fast(x), model(x))


def test_the_command_line_writes_records_and_replays_them(
    use_timer: UseTimer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from passes.cli.main import app

    monkeypatch.chdir(tmp_path)
    traced = torch.jit.trace(net()[0], net()[1])
    traced.save("net.pt")
    command = ["optimize", "net.pt", "--input", "2x3x9x9", "--no-bench", "--tuning-records", "new/tuning.json"]
    use_timer(winner(1))
    said = CliRunner().invoke(app, command).output
    assert "written to new/tuning.json" in said and "0 replayed" in said
    written = Path("new/tuning.json").read_text()
    use_timer(never)
    said = CliRunner().invoke(app, command).output
    assert "0 workloads measured" in said and "written to" not in said
    assert Path("new/tuning.json").read_text() == written
    said = CliRunner().invoke(app, [*command[:-1], "other.json", "--engine", "aten"]).output
    assert "nothing was measured: other.json is not written" in said and not Path("other.json").exists()


class RuntimeSizes(nn.Module):
    """How many rows the linear gets depends on the values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, n: Tensor) -> Tensor:
        rows = x
        for _ in range(int(n)):
            rows = torch.cat([rows, x])
        return F.gelu(self.linear(rows))


def test_what_has_no_size_before_the_run_is_fused_unmeasured(use_timer: UseTimer) -> None:
    use_timer(never)
    model, x, n = RuntimeSizes().eval(), torch.randn(2, 4), torch.tensor(2)
    program = CATALOGUE["fuse_conv_relu"](captured(torch.jit.script(model), x, n, frontend="script"))
    after, log = rewritten(lower_onednn, program, x, n)
    assert "mkldnn::_linear_pointwise" in [overload_name(node.target) for node in after.all_calls] and not log.refusals
    torch.testing.assert_close(outputs_of(after, x, torch.tensor(3))[0], model(x, torch.tensor(3)))
