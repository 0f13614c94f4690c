"""A target and its kernels written outside of the package: chosen where faster, refused with the reason elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passes import KernelProvider, OptimizedModel, OptionError, Target, Value, forget_target, load, optimize, register_target
from passes.lower.lowering import lowering_pass
from passes.lower.targets import ONEDNN
from passes.tune.timing import using_timer
from tests.check import assert_bitwise_equal, captured, rewritten
from tests.timers import never, winner

# -- the toy ------------------------------------------------------------------------------------------------------------

aten = torch.ops.aten
diagonal_of = aten.diagonal_copy.default


def linear(op, x: Value, w: Tensor, b: Tensor | None):
    return op.linear(x, w, b)


def is_diagonal(s, device, dtypes):
    if device is None or device.type != "cpu":
        return "the toy kernel runs on the CPU"
    if s.w.shape[0] != s.w.shape[1] or not torch.equal(s.w, s.w.diagonal().diag()):
        return "the weight is not diagonal"
    return None


def as_product(op, s):
    y = op.call(aten.mul.Tensor, s.x, op.call(diagonal_of, s.w))
    return y if s.b is None else op.call(aten.add.Tensor, y, s.b)


def as_linear(op, s):
    return op.call(aten.linear.default, s.x, s.w, s.b)


diagonal = KernelProvider(
    "diagonal", linear, supports=is_diagonal, build=as_product, reference=as_linear, prepack=[diagonal_of]
)
toy = Target("toy", providers=[diagonal], needs="any torch")

# -- until here: 30 lines -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A linear with a diagonal weight, one without, and an activation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale, self.mix = nn.Linear(size, size), nn.Linear(size, 3)
        self.scale.weight = nn.Parameter(torch.randn(size).diag())

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.scale(x).relu())


MODEL, X = Net(5).eval(), torch.randn(2, 5)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register_target(toy)
    yield
    forget_target("toy")


def fast(position: int, **options) -> OptimizedModel:
    with using_timer(winner(position)):
        return optimize(MODEL, [], example_inputs=X, **{"engine": "toy", **options})


def reasons(model: OptimizedModel) -> dict[str, str]:
    (step,) = [step for step in model.report.steps if step.name.startswith("lower_")]
    return {refusal.site: refusal.reason for refusal in step.refusals}


def test_it_is_chosen_where_faster_and_refused_with_its_reason_elsewhere() -> None:
    chosen = fast(0)
    assert chosen.report.engine == "toy" and chosen.report.ops_left == {"mul": 1, "add": 1, "relu": 1, "linear": 1}
    assert reasons(chosen) == {"lower_toy@linear_1": "the weight is not diagonal"}
    slower = fast(1)
    assert slower.report.ops_left == {"linear": 2, "relu": 1}
    assert reasons(slower)["lower_toy@linear"] == "the variant plain is faster here: 1000 ms diagonal, 0 ms plain"
    for model in (chosen, slower):
        torch.testing.assert_close(model(X), MODEL(X))


def test_the_record_names_it_and_is_replayed(tmp_path: Path) -> None:
    slower = fast(1)
    ((workload, record),) = slower.report.tuning_records.table.items()
    assert workload.startswith("diagonal, x float32 2x5 at 5x1, w float32 5x5 at 5x1, b float32 5 at 1, ")
    assert record.variant == "plain" and list(record.seconds) == ["diagonal", "plain"]
    slower.report.tuning_records.save(tmp_path / "tuning.json")
    with using_timer(never):
        again = optimize(MODEL, [], example_inputs=X, engine="toy", tuning_records=tmp_path / "tuning.json")
    assert again.report.ops_left == slower.report.ops_left


def test_it_is_saved_and_loaded_with_the_diagonal_prepared(tmp_path: Path) -> None:
    model = fast(0)
    model.save(tmp_path / "toy.pt")
    plain = torch.jit.load(tmp_path / "toy.pt")
    assert torch.equal(plain.prepared.results[0], MODEL.scale.weight.diagonal())
    assert "scale.weight" not in plain.state_dict() and "diagonal" not in plain._chunk_0.code
    assert_bitwise_equal([model(X)] * 2, [plain(X), load(tmp_path / "toy.pt")(X)])
    torch.testing.assert_close(plain(X), MODEL(X))


def test_the_clock_chooses_it() -> None:
    """64 rows of 1,024 numbers: 64 million products by linear, 64 thousand by the toy."""
    model, x = Net(1024).eval(), torch.randn(64, 1024)
    chosen = optimize(model, [], example_inputs=x, engine="toy")
    assert chosen.report.ops_left["mul"] == 1
    torch.testing.assert_close(chosen(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN")
@pytest.mark.parametrize("behind", [False, True])
def test_beside_the_kernels_of_another_target_all_are_measured(behind: bool) -> None:
    target = ONEDNN.with_providers(diagonal, behind=behind)
    names = ["oneDNN layers packed", "oneDNN layers plain"]
    names = [*names, "diagonal"] if behind else ["diagonal", *names]
    for position, name in enumerate(names):
        model = fast(position, engine=target)
        ((workload, record),) = [item for item in model.report.tuning_records.table.items() if "diagonal" in item[0]]
        by = "oneDNN layers, diagonal" if behind else "diagonal, oneDNN layers"
        assert workload.endswith(f"threads, by {by}") and list(record.seconds) == names and record.variant == name
        assert ("mul" in model.report.ops_left) == (name == "diagonal")
        refused = reasons(model)
        assert refused["lower_onednn@linear_1"].startswith("diagonal: the weight is not diagonal")
        torch.testing.assert_close(model(X), MODEL(X))
    with using_timer(never):
        unmeasured = optimize(MODEL, [lowering_pass(target).with_options(variant="fused")], example_inputs=X)
    assert ("mul" in unmeasured.report.ops_left) == (not behind)


def test_the_invariants_of_passes_hold() -> None:
    program = captured(MODEL, X)
    for position in (0, 1):
        with using_timer(winner(position)):
            _, log = rewritten(lowering_pass(toy), program, X)
            assert [rewrite.site for rewrite in log.rewrites] == ["lower_toy@linear"]
            assert lowering_pass(toy)(program, skip=["lower_toy@linear"]) is program


def test_a_result_of_another_shape_is_refused() -> None:
    wrong = replace(diagonal, build=lambda op, s: op.call(aten.sum.default, s.x), supports=lambda *given: None)
    model = fast(0, engine=Target("wrong", providers=[wrong]))
    assert reasons(model)["lower_wrong@linear"] == "diagonal: the result would change shape from (2, 5) to ()"
    assert model.report.ops_left == {"linear": 2, "relu": 1}


def test_a_kernel_that_does_not_take_the_operands_is_refused() -> None:
    wrong = replace(diagonal, build=lambda op, s: op.call(aten.matmul.default, s.w, s.x), reference=as_linear)
    program = captured(MODEL, X)
    after, log = rewritten(lowering_pass(Target("wrong", providers=[wrong])).with_options(variant="fused"), program, X)
    (reason, _) = [refusal.reason for refusal in log.refusals]
    assert after is program and reason.startswith("diagonal: the new op does not take these operands: aten::matmul(")


def test_providers_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(OptionError, match="'plain' is what records call the reference of a kernel provider"):
        replace(diagonal, name="plain")
    with pytest.raises(OptionError, match="the target 'twice' has two kernel providers of one name: diagonal, diagonal"):
        Target("twice", providers=[diagonal, diagonal])
    with pytest.raises(OptionError, match="the kernel provider 'none' needs either build= or variants="):
        KernelProvider("none", linear, reference=as_linear)


class Diagonals(nn.Module):
    """A linear with a diagonal weight, and the toy's prepack op in the model itself: on a constant, and on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.v = nn.Linear(5, 5), nn.Parameter(torch.randn(5, 5))
        self.scale.weight = nn.Parameter(torch.randn(5).diag())

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) * torch.diagonal_copy(self.v) + torch.diagonal_copy(x)[0]


@pytest.mark.parametrize("engine", ["aten", "toy"])
def test_the_prepack_op_of_a_provider_stays_ordinary_in_models(engine: str) -> None:
    model = Diagonals().eval()
    with using_timer(winner(0)):
        plain = optimize(model, ["fold_constants"], example_inputs=X, engine=engine)
    assert plain.report.ops_left["diagonal_copy"] == 1  # that of the input
    assert hasattr(plain.scripted, "prepared") == (engine == "toy")
    torch.testing.assert_close(plain(X), model(X))


def test_what_is_prepacked_stays_so_behind_other_passes() -> None:
    passes = [lowering_pass(toy), "eliminate_common_subexpressions", "fold_constants"]
    with using_timer(winner(0)):
        model = optimize(MODEL, passes, example_inputs=X)
    assert len(model.scripted.prepared.results) == 1


twice = replace(
    diagonal,
    build=lambda op, s: op.call(aten.mul.Tensor, s.x, op.call(aten.clone.default, op.call(diagonal_of, s.w))),
    supports=lambda s, device, dtypes: is_diagonal(s, device, dtypes) or (None if s.b is None else "there is a bias"),
    prepack=[diagonal_of, aten.clone.default],
)


def without_bias() -> nn.Module:
    model = Net(5).eval()
    model.scale.bias = None
    return model


def test_a_prepack_of_a_prepack_is_prepared_when_the_file_is_loaded() -> None:
    model = without_bias()
    with using_timer(winner(0)):
        chosen = optimize(model, [], example_inputs=X, engine=Target("twice", providers=[twice]))
    assert chosen.report.ops_left == {"mul": 1, "relu": 1, "linear": 1}
    assert torch.equal(chosen.scripted.prepared.results[0], model.scale.weight.diagonal())
    torch.testing.assert_close(chosen(X), model(X))


def test_a_kernel_that_would_prepack_in_every_call_is_refused() -> None:
    half_packed = replace(twice, prepack=[aten.clone.default])
    with using_timer(winner(0)):
        model = optimize(without_bias(), [], example_inputs=X, engine=Target("half", providers=[half_packed]))
    reason = "diagonal: clone prepares constants, and here it is given what is known at run time only"
    assert reasons(model)["lower_half@linear"] == reason and model.report.ops_left == {"linear": 2, "relu": 1}


# -- a pattern of several ops -------------------------------------------------------------------------------------------


def relu_of_linear(op, x: Value, w: Value, b: Value | None):
    return op.relu(op.linear(x, w, b))


def clamped(op, s):
    return op.call(aten.clamp_min.default, op.call(aten.linear.default, s.x, s.w, s.b), 0)


def written(op, s):
    return op.call(aten.relu.default, op.call(aten.linear.default, s.x, s.w, s.b))


def test_a_pattern_of_several_ops_is_replaced_as_one() -> None:
    target = Target("pairs", providers=[KernelProvider("clamped", relu_of_linear, build=clamped, reference=written)])
    assert fast(0, engine=target).report.ops_left == {"linear": 2, "clamp_min": 1}
    left = fast(1, engine=target)
    assert left.report.ops_left == {"linear": 2, "relu": 1}
    assert list(reasons(left)) == ["lower_pairs@relu"]
    for position in (0, 1):
        with using_timer(winner(position)):
            rewritten(lowering_pass(target), captured(MODEL, X), X)  # a second run finds nothing more to do
