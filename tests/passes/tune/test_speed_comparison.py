"""The speed comparison: what `on_slower` does with a slower model, what the report says, and what timing leaves behind.

Times are injected; only the tests of what timing leaves behind time anything, and they assert no duration.
"""

from __future__ import annotations

import doctest
import json
import random
import warnings
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ir_tools.emit.to_torchscript import emit
from ir_tools.ir import Block, Draft
from ir_tools.ir.dialect import aten, short_name
from ir_tools.rewrite import RewriteLog
from passes import OptimizedModel, SlowerWarning, graph_pass, load, optimize
from passes.driver.catalogue import CATALOGUE
from passes.lower.targets import ATEN
from passes.report import formatting
from passes.tune import speed_comparison as speed
from passes.tune import tuning_record
from passes.tune.speed_comparison import Candidate, Speed, asks_for_speed_comparison, is_slower
from passes.tune.timing import interleaved_seconds
from tests.check import captured
from tests.timers import SpeedComparisons, UseTimer

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).eval()


FASTER = {"without": [0.004] * 5, "with": [0.002] * 5}
SLOWER = {"without": [0.002] * 5, "with": [0.004] * 5}
EVEN = {"without": [0.002] * 5, "with": [0.00205] * 5}


def halved(on_slower: str | None = None, **options: Any) -> OptimizedModel:
    wanted = "cast_half" + (f":on_slower={on_slower}" if on_slower else "")
    return optimize(net(), ["fuse_conv_bn_relu", wanted], example_inputs=X, **options)


def dtypes(model: OptimizedModel) -> set[torch.dtype]:
    return {t.dtype for t in model.program.constants.values() if t.is_floating_point()}


def quietly(*args: Any, **options: Any) -> OptimizedModel:
    """`halved`, where no `SlowerWarning` may come."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowerWarning)
        return halved(*args, **options)


# -- who asks -----------------------------------------------------------------------------------------------------------


def test_the_option_asks_for_the_comparison() -> None:
    assert asks_for_speed_comparison(CATALOGUE["cast_half"])
    assert [p.name for p in CATALOGUE.values() if asks_for_speed_comparison(p)] == ["cast_half"]


def test_no_comparison_without_a_pass_that_asks(use_timer: UseTimer) -> None:
    use_timer(timer := SpeedComparisons(SLOWER))
    fast = optimize(net(), example_inputs=X)
    assert fast.report.speed is None and not timer.seen and fast.manifest["speed"] is None
    assert fast.report.to_dict()["speed"] is None


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double().sin()


def test_no_comparison_where_the_pass_changed_nothing(use_timer: UseTimer) -> None:
    use_timer(timer := SpeedComparisons(SLOWER))
    fast = optimize(Doubles().eval(), "cast_half", example_inputs=X.double())
    assert not fast.report.steps[0].changed and fast.report.speed is None and not timer.seen


def test_no_comparison_in_a_dry_run(use_timer: UseTimer) -> None:
    use_timer(timer := SpeedComparisons(SLOWER))
    plan = optimize(net(), "cast_half", example_inputs=X, dry_run=True)
    assert plan.steps[0].changed and plan.speed is None and not timer.seen


# -- the policies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_slower", [None, "warn", "keep", "revert"])
@pytest.mark.parametrize("times, decision", [(FASTER, "faster"), (EVEN, "even")])
@pytest.mark.parametrize("verify", ["each", "off"])
def test_a_model_that_is_not_slower_is_returned(use_timer: UseTimer, on_slower, times, decision, verify) -> None:
    use_timer(timer := SpeedComparisons(times))
    fast = quietly(on_slower, verify=verify)
    compared = fast.report.speed
    assert compared.decision == decision and not compared.slower and len(timer.seen) == 1
    assert torch.bfloat16 in dtypes(fast) and not any(step.reverted for step in fast.report.steps)
    assert "cast_half" in fast.manifest["passes"]


@pytest.mark.parametrize("on_slower", [None, "warn"])
def test_warn_returns_the_slower_model_and_warns_at_the_line_that_called(use_timer: UseTimer, on_slower) -> None:
    use_timer(SpeedComparisons(SLOWER))
    with pytest.warns(SlowerWarning) as heard:
        fast = optimize(net(), [f"cast_half:on_slower={on_slower}" if on_slower else "cast_half"], example_inputs=X)
    (warning,) = [w for w in heard if w.category is SlowerWarning]
    assert warning.filename == __file__
    for part in ("cast_half", "2 ms per call in float32", "4 ms in bfloat16", "on_slower=revert", "another dtype", "fewer"):
        assert part in str(warning.message)
    assert fast.report.speed.decision == "warned" and torch.bfloat16 in dtypes(fast)


def test_keep_returns_the_slower_model_and_the_report_says_so(use_timer: UseTimer) -> None:
    use_timer(SpeedComparisons(SLOWER))
    fast = quietly("keep")
    assert fast.report.speed.decision == "kept" and fast.report.speed.slower and torch.bfloat16 in dtypes(fast)
    line = "bfloat16 is SLOWER than float32 on this machine: 2 → 4 ms, 0.50x as fast; returning the bfloat16 model"
    assert f"{line} (on_slower='keep')" in " ".join(str(fast.report).split())


@pytest.mark.parametrize("verify", ["each", "ends", "off"])
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_revert_returns_the_model_without_the_pass(use_timer: UseTimer, tmp_path, verify, engine) -> None:
    use_timer(SpeedComparisons(SLOWER))
    fast = quietly("revert", verify=verify, engine=engine)
    model = net()
    plain = optimize(model, ["fuse_conv_bn_relu"], example_inputs=X, engine=engine, verify=verify)
    assert dtypes(fast) == {torch.float32}
    assert [short_name(n.target) for n in fast.program.calls] == [short_name(n.target) for n in plain.program.calls] or (
        engine == "onednn_ops"  # which variant of a kernel is faster was measured twice
    )
    found = fast.report
    names = [step.name for step in found.steps]
    behind = ["lower_aten", "follow_inputs"] if engine == "aten" else ["lower_onednn"]
    assert names == [*names[: names.index("cast_half") + 1], "remove_dead_code", *behind]
    (step,) = [step for step in found.steps if step.name == "cast_half"]
    assert step.rewrites and not step.changed and "SLOWER than float32" in step.reverted
    assert found.speed.decision == "reverted" and "to" not in found.ops_left
    assert "cast_half" not in fast.manifest["passes"] and "fuse_conv_relu" in fast.manifest["passes"]
    assert fast.manifest["speed"]["decision"] == "reverted" and fast.manifest["golden_sqnr_db"] == 60
    if verify == "off":
        assert found.sqnr_db is None and not found.verified
    else:
        assert found.sqnr_db > 100 and fast.manifest["sqnr_db"] in (found.sqnr_db, "inf")
    fast.save(tmp_path / "model.pt")
    torch.testing.assert_close(load(tmp_path / "model.pt")(X), fast(X))
    text = str(found)
    assert "  reverted\n" in text and "returning the float32 model (on_slower='revert')" in " ".join(text.split())


def test_revert_reports_the_tuning_records_of_the_model_that_is_returned(use_timer: UseTimer) -> None:
    use_timer(SpeedComparisons(SLOWER))
    records = quietly("revert", engine="onednn_ops").report.tuning_records
    assert records.requested and not any("bfloat16" in workload for workload in records.requested)
    assert not any("bfloat16" in workload for workload in records.table)
    kept = quietly("keep", engine="onednn_ops").report.tuning_records
    assert kept.requested and all("bfloat16" in workload for workload in kept.requested)


@pytest.mark.parametrize("verify", ["each", "ends"])
def test_only_the_pass_that_was_compared_is_left_out(use_timer: UseTimer, verify) -> None:
    """Passes before it and after it stay, a second one that asks too, and a note says that it was not compared."""
    use_timer(SpeedComparisons(SLOWER))
    second = "cast_half:dtype=float16:on_slower=keep"
    passes = ["fuse_conv_relu", "cast_half:level=O1:on_slower=revert", second, "remove_dead_code"]
    fast = optimize(net(), passes, example_inputs=X, engine="aten", verify=verify)
    names = [step.name for step in fast.report.steps]
    assert names == ["fuse_conv_relu", "cast_half", "cast_half", "remove_dead_code", "lower_aten", "follow_inputs"]
    assert [bool(step.reverted) for step in fast.report.steps] == [False, True, False, False, False, False]
    assert dtypes(fast) == {torch.float16} and fast.manifest["passes"].count("cast_half") == 1
    (note,) = [note for note in fast.report.notes if "not compared" in note]
    assert note.startswith(f"{second}: its speed was not compared")
    assert fast.report.speed.names == ("bfloat16", "the model without cast_half"), "which computes in float16"


def test_a_second_pass_that_asks_stays_with_the_first_too(use_timer: UseTimer) -> None:
    use_timer(SpeedComparisons(FASTER))
    passes = ["cast_half:level=O1:keep_float=linear", "cast_half:dtype=float16"]
    fast = optimize(net(), passes, example_inputs=X, engine="aten")
    assert dtypes(fast) == {torch.bfloat16, torch.float16} and len([n for n in fast.report.notes if "not compared" in n]) == 1
    alone = optimize(net(), [passes[0], "cast_half:level=O1:keep_float=linear"], example_inputs=X, engine="aten")
    assert not any("not compared" in note for note in alone.report.notes), "the second one changed nothing"


class OneHalfLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu().half()).float()


def test_a_model_that_is_not_float32_alone_is_not_called_so(use_timer: UseTimer) -> None:
    """Nor is it called after its narrowest layer, which the pass did not touch."""
    use_timer(SpeedComparisons(SLOWER))
    fast = optimize(OneHalfLayer().eval(), "cast_half:on_slower=keep", example_inputs=torch.randn(4, 8))
    assert (fast.report.speed.dtype, fast.report.speed.reference) == ("bfloat16", "")
    assert "bfloat16 is SLOWER than the model without cast_half on this machine" in " ".join(str(fast.report).split())
    use_timer(SpeedComparisons(FASTER))
    fast = optimize(OneHalfLayer().eval(), "cast_half:dtype=float16", example_inputs=torch.randn(4, 8))
    assert str(fast.report.speed).startswith("float16: ") and str(fast.report.speed).count("the model without cast_half") == 1


# -- measuring ----------------------------------------------------------------------------------------------------------


def test_slower_is_reported_after_a_second_measurement_and_that_one_counts(use_timer: UseTimer) -> None:
    use_timer(timer := SpeedComparisons(SLOWER, FASTER))
    assert quietly().report.speed.decision == "faster" and len(timer.seen) == 2
    use_timer(timer := SpeedComparisons(SLOWER, {"without": [0.002] * 7, "with": [0.003] * 7}))
    compared = quietly("keep").report.speed
    assert (compared.decision, compared.with_pass, compared.rounds, len(timer.seen)) == ("kept", 0.003, 7, 2)


@pytest.mark.parametrize(
    "without, with_pass, expected",
    [
        ([1.0], [1.1], True),
        ([1.0], [1.04], False),  # the margin
        ([1.0], [0.9], False),
        ([1.0, 1.0, 1.0], [1.04, 1.2, 1.2], False),  # its fastest call is within the margin
        ([1.0, 1.0, 1.0], [1.1, 1.1, 9.0], True),
        ([1.0, 1.2, 1.2], [1.1, 1.2, 1.2], False),  # its median is
    ],
)
def test_slower_needs_a_margin_in_the_median_and_in_the_fastest_call(without, with_pass, expected) -> None:
    assert is_slower({"without": without, "with": with_pass}) is expected


def test_what_is_timed_are_both_emitted_modules_on_the_first_example(use_timer: UseTimer) -> None:
    use_timer(timer := SpeedComparisons(FASTER))
    model, other = net(), torch.randn_like(X)
    fast = optimize(model, "cast_half", example_inputs=[(X,), (other,)], engine="aten")
    (candidates,) = timer.seen
    assert list(candidates) == ["without", "with"] and candidates["with"].scripted is fast.scripted
    assert all(torch.equal(c.arguments[0], X) for c in candidates.values())
    plain = candidates["without"].scripted
    torch.testing.assert_close(plain(X), model(X))
    assert {t.dtype for t in plain.state_dict().values()} == {torch.float32}
    assert torch.bfloat16 in {t.dtype for t in fast.scripted.state_dict().values()}


def test_progress_reports_the_model_without_the_pass(use_timer: UseTimer) -> None:
    use_timer(SpeedComparisons(FASTER))
    lines: list[str] = []
    halved(engine="aten", progress=lines.append)
    at = lines.index("emitting TorchScript")
    assert lines[at + 1 :] == [
        "without cast_half: remove_dead_code", "without cast_half: lower_aten", "without cast_half: follow_inputs",
        "emitting TorchScript without cast_half", "timing the model without cast_half and with it in turn",
    ]  # fmt: skip


@pytest.mark.parametrize("on_slower", ["warn", "keep", "revert"])
def test_a_model_without_the_pass_that_cannot_be_had_fails_nothing(on_slower) -> None:
    """The second emission fails: the report says why there is no comparison, and the half model is returned."""
    emitted = []

    def emit_once(program):
        if emitted:
            raise RuntimeError("no second time")
        emitted.append(program)
        return emit(program)

    fast = quietly(on_slower, engine=replace(ATEN, emitter=emit_once))
    compared = fast.report.speed
    assert (compared.decision, compared.ratio, compared.slower) == ("unknown", None, False)
    assert "bfloat16 was not timed against float32: RuntimeError: no second time" in " ".join(str(fast.report).split())
    assert torch.bfloat16 in dtypes(fast) and not any(step.reverted for step in fast.report.steps)


def test_wrong_numbers_of_the_model_without_the_pass_are_no_comparison(use_timer: UseTimer) -> None:
    """A pass behind the cast is wrong on float32: by one percent, which half precision would excuse."""

    @graph_pass(effects={"rounds"})
    def spoils_float(program: Block, log: RewriteLog) -> Block:
        draft = Draft.of(program)
        for node in draft.program.calls:
            if short_name(node.target) == "relu" and all(t.dtype is torch.float32 for t in program.constants.values()):
                with draft.before(node):
                    draft.redirect(node, draft.call(aten.mul.Scalar, draft.call(aten.relu.default, *node.args), 1.01))
        return draft.finish()

    use_timer(timer := SpeedComparisons(SLOWER))
    fast = optimize(net(), ["cast_half:on_slower=revert", spoils_float], example_inputs=X, engine="aten")
    assert fast.report.speed.decision == "unknown" and "NumericsError" in fast.report.speed.reason and not timer.seen


def test_verify_ends_knows_what_passes_before_the_cast_declared(use_timer: UseTimer) -> None:
    """One that quantises came before: the model without the cast may be as far off."""

    @graph_pass(effects={"quantizes"})
    def rounds(program: Block, log: RewriteLog) -> Block:
        draft = Draft.of(program)
        for node in draft.program.calls:
            if short_name(node.target) == "relu":
                with draft.before(node):
                    draft.redirect(node, draft.call(aten.mul.Scalar, draft.call(aten.relu.default, *node.args), 1.02))
        return draft.finish()

    use_timer(SpeedComparisons(SLOWER))
    fast = optimize(net(), [rounds, "cast_half:on_slower=revert"], example_inputs=X, engine="aten", verify="ends")
    assert fast.report.speed.decision == "reverted" and 20 < fast.report.sqnr_db < 40


def test_a_pass_of_the_users_own_asks_too(use_timer: UseTimer) -> None:
    """Of any declaration, and behind the lowering."""

    @graph_pass(effects=())
    def relu_twice(program: Block, log: RewriteLog, *, on_slower: Literal["keep", "revert"] = "revert") -> Block:
        draft = Draft.of(program)
        (relu,) = [node for node in draft.program.calls if short_name(node.target) == "relu"]
        if any(short_name(n.target) == "relu" for n in relu.all_input_nodes):
            return program
        with draft.before(relu):
            draft.redirect(relu, draft.call(aten.relu.default, draft.call(aten.relu.default, *relu.args)))
        return draft.finish()

    use_timer(SpeedComparisons(SLOWER))
    fast = optimize(net(), ["lower_aten", relu_twice], example_inputs=X)
    assert fast.report.ops_left["relu"] == 1 and fast.report.speed.decision == "reverted"
    assert "the model with relu_twice is SLOWER than the model without relu_twice" in " ".join(str(fast.report).split())
    kept = optimize(net(), ["lower_aten", relu_twice.with_options(on_slower="keep")], example_inputs=X)
    assert kept.report.ops_left["relu"] == 2 and kept.report.speed.decision == "kept"


def test_dumps_end_with_the_graph_that_is_returned(use_timer: UseTimer, tmp_path) -> None:
    use_timer(SpeedComparisons(SLOWER))
    fast = optimize(net(), "cast_half:on_slower=revert", example_inputs=X, engine="aten", dump_dir=tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*.dot"))
    assert names == ["00-captured.dot", "01-cast_half.dot", "02-remove_dead_code.dot", "03-lower_aten.dot",
                     "04-follow_inputs.dot", "05-without_cast_half.dot"]  # fmt: skip
    assert "bfloat16" in (tmp_path / names[-2]).read_text() and "bfloat16" not in (tmp_path / names[-1]).read_text()
    assert tmp_path / names[-1] in fast.dumps


# -- the words ----------------------------------------------------------------------------------------------------------

HALF = Speed("cast_half", "bfloat16", "float32", "faster", 0.0051, 0.0027, 40, seconds=1.5)


def test_the_line_says_how_many_times_as_fast() -> None:
    assert str(HALF) == "bfloat16: 5.1 → 2.7 ms, 1.89x as fast as float32 on this machine"
    even = Speed("cast_half", "float16", "float32", "even", 0.0051, 0.0052, 40)
    assert str(even) == "float16: 5.1 → 5.2 ms, 0.98x as fast as float32 on this machine; within measurement noise"


@pytest.mark.parametrize("module", [speed, tuning_record, formatting], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module) -> None:
    tested = doctest.testmod(module)
    assert tested.attempted and not tested.failed


def test_the_comparison_is_plain_data(use_timer: UseTimer) -> None:
    use_timer(SpeedComparisons(FASTER))
    fast = halved()
    data = json.loads(json.dumps(fast.report.to_dict(), allow_nan=False))["speed"]
    assert data == fast.manifest["speed"]
    assert data.pop("seconds") > 0
    assert data == {
        "pass_name": "cast_half", "dtype": "bfloat16", "reference": "float32", "decision": "faster", "without": 0.004,
        "with_pass": 0.002, "rounds": 5, "reason": "", "ratio": 2.0, "slower": False,
    }  # fmt: skip
    assert "the speed comparison" in str(fast.report)


# -- what timing leaves behind ------------------------------------------------------------------------------------------


class FullAfterFour(nn.Module):
    """A cache with four slots: a fifth call fails. It writes into its input, too, and draws at random."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("cache", torch.zeros(4, 3))
        self.register_buffer("at", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x * 0.5)
        self.cache.index_copy_(0, self.at, y[:1])
        self.at.add_(1)
        x.add_(1)
        return y + self.cache.sum(0) + torch.rand(3)


def test_state_inputs_and_generators_are_as_before() -> None:
    model, x = FullAfterFour().eval(), torch.randn(2, 3)
    before = x.clone()
    torch.manual_seed(7)
    random.seed(7)
    state, python_state, threads = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    fast = quietly_or_not(model, x)
    assert fast.report.speed.decision != "unknown", fast.report.speed.reason
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python_state
    assert torch.get_num_threads() == threads and torch.is_grad_enabled() and torch.equal(x, before)
    buffers = dict(fast.scripted.named_buffers())
    (at,) = [t for t in buffers.values() if t.dtype is torch.int64]
    (cache,) = [t for t in buffers.values() if t.shape == (4, 3)]
    assert at.tolist() == [0] and not cache.any()
    for _ in range(4):
        fast(x.clone())
    with pytest.raises(Exception, match="index"):
        fast(x.clone())


def quietly_or_not(model: nn.Module, x: Tensor) -> OptimizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowerWarning)  # tiny models are as fast as the casts let them be
        return optimize(model, "cast_half", example_inputs=x, frontend="export")


def test_every_call_finds_what_the_first_one_found_and_putting_it_back_is_not_timed() -> None:
    model, x = FullAfterFour().eval(), torch.randn(2, 3)
    program = captured(model, x.clone(), frontend="export")
    events: list[str] = []

    class Spied:
        def buffers(self) -> list[Tensor]:
            return [state]

        def __call__(self, given: Tensor) -> None:
            assert torch.equal(given, x) and state.item() == 0
            given.add_(1)
            state.add_(1)
            events.append("call")

    state = torch.zeros(1)
    candidate = Candidate(program, Spied(), [x])
    speed.measure({"without": candidate, "with": Candidate(program, Spied(), [x])}, warm_up=2)
    assert state.item() == 0 and len(events) > 4 and torch.equal(candidate.arguments[0], x)
    assert candidate.arguments[0] is not x


def test_a_model_that_keeps_nothing_has_nothing_put_back() -> None:
    program = captured(nn.Linear(3, 3).eval(), torch.randn(2, 3))
    assert Candidate(program, nn.Linear(3, 3), [torch.randn(2, 3)]).kept == []


def test_slow_models_get_a_single_round(use_timer: UseTimer) -> None:
    """The clock is injected: each call takes ten seconds."""
    now = [0.0]
    use_timer(partial(interleaved_seconds, clock=lambda: now[0]))
    program = captured(nn.Linear(3, 3).eval(), torch.randn(2, 3))

    def takes(seconds: float) -> Candidate:
        def call(x: Tensor) -> None:
            now[0] += seconds

        return Candidate(program, call, [X])

    times = speed.measure({"without": takes(10.0), "with": takes(20.0)}, warm_up=3)
    assert times == {"without": [10.0], "with": [20.0]} and now[0] == 60.0
    now[0] = 0.0
    times = speed.measure({"without": takes(0.001), "with": takes(0.002)})
    assert len(times["with"]) == speed.MOST_ROUNDS
