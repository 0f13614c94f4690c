"""Device constants that the model takes from its inputs follow them again, so that `engine="aten"` files move.

A file is moved to the device "meta", which takes no accelerator: there torch refuses an op whose tensors are on two devices.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ir_tools.frontends.portability import factories_behind
from ir_tools.frontends.source import prepare
from ir_tools.ir import ConstantTable, Program
from ir_tools.ir.dialect import short_name
from ir_tools.rewrite import Artifacts
from ir_tools.rewrite.notes import Notes
from ir_tools.verify.device_placement import Factories
from passes import CATALOGUE, NumericsError, OptimizedModel, PassOrderError, optimize
from tests.check import assert_bitwise_equal, captured, rewritten

follow_inputs = CATALOGUE["follow_inputs"]
FRONTENDS = ["export", "trace", "script"]  # fx cannot trace sizes taken from an input


def row() -> torch.Tensor:
    return torch.randn(2, 5, 4)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)


class Positions(Module):
    """A mask, a table that is filled in place, and positions; all on the device of the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        table = torch.zeros(n, 4, device=x.device)
        table[1:3] = torch.ones(4, device=x.device)
        positions = torch.arange(n, device=x.device)
        mask = torch.full((n, n), float("-inf"), device=x.device).triu(1)
        scores = self.linear(x) @ x.transpose(1, 2) + mask
        return torch.softmax(scores, -1) @ (x + table) * positions[:, None]


class EveryFactory(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[2]
        d = self.linear.weight.device
        y = x + torch.eye(n, device=d)[0] + torch.linspace(0, 1, n, device=d) + torch.empty(n, device=d).fill_(2)
        y = y + torch.full((n,), 2, device=d) + torch.zeros_like(x, device=d) + torch.arange(1, n + 1, device=d)
        return torch.where(torch.ones(n, device=d, dtype=torch.bool), y, torch.ones(n, device=d, dtype=torch.float64))


class MovedLater(Module):
    """Made on the CPU and then moved: in the file they are made where they are needed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) + torch.ones(4).to(x.device) + torch.arange(4).to(x)
        buffer = torch.zeros(2, 5, 4)
        buffer.copy_(y)
        return (y + buffer.to(x.device))[torch.zeros(1, dtype=torch.long)] * torch.full((), 2.0)


class OnTheCpu(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.ones(4, device=torch.device("cpu"))


class Default(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.ones(4)


class Both(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x) * torch.full((4,), 3.0, device=x.device)
        return y + torch.ones(4, device="cpu")


class MadeOnTheCpuAndReturned(Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.arange(4)
        return self.linear(x) + count.to(x.device), count


class SkipsTheMask(Module):
    """Leaves out what changes nothing, but not in a trace: the ordinary run on the example makes no zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if not (torch.jit.is_tracing() or torch.compiler.is_exporting()) and bool((x > -0.5).all()):
            return y
        return torch.where(x > -0.5, y, torch.zeros(4, device=x.device))


PORTABLE = [Positions, EveryFactory, MovedLater]
FIXED = [OnTheCpu, Default, Both, MadeOnTheCpuAndReturned]


def device_ops(program: Program) -> list[str]:
    """Factory ops that still make their tensor on a device of their own, with no move behind."""
    return [
        short_name(node.target)
        for node in program.calls
        if not node.all_input_nodes and not all(short_name(user.target) == "to" for user in node.users)
    ]


def compiled(model, x: torch.Tensor, frontend: str = "auto", **options) -> OptimizedModel:
    # Folding would turn each factory into a constant, which moves with the file as it is.
    model = model.eval() if isinstance(model, nn.Module) else model
    return optimize(model, ["fuse_conv_bn"], example_inputs=x, engine="aten", frontend=frontend, **options)


def run_elsewhere(program: Program, x: torch.Tensor) -> None:
    moved = program.copy()
    moved.constants = ConstantTable({name: t.to("meta") for name, t in program.constants.items()})
    assert all(t.device.type == "meta" for t in moved.run(x.to("meta")))


def runs_elsewhere(fast: OptimizedModel, x: torch.Tensor) -> None:
    """Run the Program and the file on another device; raises where an op meets tensors on two."""
    run_elsewhere(fast.program, x)
    file = io.BytesIO()
    torch.jit.save(fast.scripted, file)
    file.seek(0)
    result = torch.jit.load(file, map_location="meta")(x.to("meta"))
    assert all(t.device.type == "meta" for t in (result if isinstance(result, tuple) else (result,)))


# -- files that move ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("model", PORTABLE)
def test_a_device_taken_from_an_input_is_taken_from_it_at_run_time(model, frontend):
    model, x = model().eval(), row()
    fast = compiled(model, x, frontend)
    assert device_ops(fast.program) == []
    assert fast.report.notes == []
    assert torch.equal(fast(x), model(x))
    runs_elsewhere(fast, x)


@pytest.mark.parametrize("model", PORTABLE)
def test_without_the_rewrite_the_files_do_not_move(model):
    """The check above can fail: the Program as captured mixes devices."""
    x = row()
    with pytest.raises(RuntimeError, match=r"device|meta"):
        run_elsewhere(captured(model(), x), x)


@pytest.mark.parametrize("model", [*PORTABLE, *FIXED])
def test_the_rewrite_changes_no_number_and_no_fact(model):
    x = row()
    program, source = captured(model(), x), prepare(model().eval(), [((x,), {})])
    expected = program.run(x.clone())
    probed = Artifacts(factories_behind(source, program))
    after, _ = rewritten(follow_inputs, program, x, artifacts=probed)
    assert_bitwise_equal(expected, after.run(x.clone()))
    assert (after is program) == (model in FIXED and model is not Both)


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_what_only_other_inputs_make_an_ordinary_run_do(frontend):
    x = torch.rand(2, 5, 4)
    fast = compiled(SkipsTheMask(), x, frontend)
    assert "new_zeros" in [short_name(node.target) for node in fast.program.calls]
    runs_elsewhere(fast, x)


def test_what_was_folded_moves_as_a_constant():
    fast = optimize(OnTheCpu().eval(), example_inputs=row(), engine="aten")
    assert fast.report.notes == []
    runs_elsewhere(fast, row())


def test_a_model_without_factories_is_not_touched():
    model, x = Module().linear.eval(), torch.randn(2, 4)
    program = captured(model, x)
    found = factories_behind(prepare(model, [((x,), {})]), program)
    assert found == Factories() and follow_inputs(program, artifacts=Artifacts(found)) is program


# -- a pass like others ---------------------------------------------------------------------------------------------------


def test_it_is_a_step_that_is_reported_and_verified():
    fast = compiled(Both(), row())
    assert [step.name for step in fast.report.steps][-2:] == ["lower_aten", "follow_inputs"]
    step = fast.report.steps[-1]
    assert [(r.site, r.rule) for r in step.rewrites] == [("follow_inputs@full", "follow_inputs")]
    assert step.tolerance == "bitwise" and step.effects == () and step.sqnr_db == float("inf")
    (refusal,) = step.refusals
    assert refusal.site == "follow_inputs@ones" and refusal.expected and fast.report.notes[0].endswith(refusal.reason)
    assert fast.manifest["passes"][-1] == "follow_inputs"


def test_a_wrong_device_placement_that_moves_numbers_is_noticed(monkeypatch):
    import importlib

    module = importlib.import_module("passes.lower.follow_inputs")
    monkeypatch.setitem(module.NEW, torch.ops.aten.zeros.default, torch.ops.aten.new_ones.default)
    with pytest.raises(NumericsError, match=r"the pass follow_inputs .*it is declared exact, but outputs moved"):
        compiled(Positions(), row(), "trace")


def test_sites_can_be_skipped():
    x = row()
    source = prepare(EveryFactory().eval(), [((x,), {})])
    found = Artifacts(factories_behind(source, captured(EveryFactory(), x)))
    program = captured(EveryFactory(), x)
    after, log = rewritten(follow_inputs, program, x, artifacts=found)
    sites = [rewrite.site for rewrite in log.rewrites]
    assert len(sites) == len(set(sites)) > 5
    left, log = rewritten(follow_inputs, program, x, skip={sites[0]}, artifacts=found)
    assert [rewrite.site for rewrite in log.rewrites] == sites[1:]
    assert follow_inputs(program, skip=sites, artifacts=found) is program


def test_alone_it_knows_nothing_and_leaves_all_as_it_is():
    program, artifacts = captured(Both(), row()), Artifacts()
    assert follow_inputs(program, artifacts=artifacts) is program
    assert all("whether that follows the inputs is not known" in line for line in artifacts[Notes].lines)


def test_it_is_given_once_and_behind_the_folding_of_constants():
    for passes in (["follow_inputs"], ["fuse_conv_bn", "follow_inputs"], ["fuse_conv_bn"]):
        report = optimize(Both().eval(), passes, example_inputs=row(), engine="aten", dry_run=True)
        assert [step.name for step in report.steps].count("follow_inputs") == 1
    with pytest.raises(PassOrderError, match="made on an input's device is no constant"):
        optimize(Both().eval(), ["follow_inputs", "fold_constants"], example_inputs=row(), engine="aten")


class InABranch(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        if bool(y.sum() > 0):
            y = y + torch.ones(4, device=x.device) * x.shape[1]
        return y


def test_in_a_branch_it_stays_and_is_reported():
    x = row()
    fast = optimize(torch.jit.script(InABranch().eval()), ["remove_dropout"], example_inputs=x, engine="aten")
    (note,) = [n for n in fast.report.notes if "device" in n]
    assert note.endswith("ones makes a tensor on cpu in a branch or loop, where it does not follow the inputs: "
                         "keep the file on that device")  # fmt: skip


# -- files that do not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("model, ops", [(OnTheCpu, ["ones"]), (Default, ["ones"]), (Both, ["ones"])])
def test_a_device_that_the_source_names_is_reported(model, ops, frontend):
    model, x = model().eval(), row()
    fast = compiled(model, x, frontend)
    assert device_ops(fast.program) == ops
    (note,) = [n for n in fast.report.notes if "device" in n]
    assert note.startswith("test_follow_inputs.py:")
    assert note.endswith("ones makes a tensor on cpu whatever the inputs' device: the file cannot move to another device")
    assert torch.equal(fast(x), model(x))
    with pytest.raises(RuntimeError, match="device"):
        runs_elsewhere(fast, x)


def test_a_tensor_that_the_model_also_returns_stays_where_it_was_made():
    fast = compiled(MadeOnTheCpuAndReturned(), row())
    assert device_ops(fast.program) == ["arange"] and len(fast.report.notes) == 1


class LikeTheInputOnTheCpu(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * torch.full((4,), 3.0, device=x.device) + torch.zeros_like(x, device="cpu")


def test_a_device_named_beside_a_tensor_is_found_too():
    (note,) = compiled(LikeTheInputOnTheCpu(), row()).report.notes
    assert "zeros_like makes a tensor on cpu whatever the inputs' device" in note


def test_a_dry_run_reports_it_too():
    report = compiled(OnTheCpu(), row(), dry_run=True)
    assert any("the file cannot move to another device" in note for note in report.notes)


def test_onednn_files_do_not_move_and_are_left_alone():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("needs oneDNN")
    fast = optimize(Positions().eval(), "fuse_conv_bn", example_inputs=row(), engine="onednn_ops")
    assert "zeros" in device_ops(fast.program) and fast.report.notes == []


def test_an_exported_program_names_its_device():
    x = row()
    exported = torch.export.export(Positions().eval(), (x,))
    notes = compiled(exported, x).report.notes
    assert [note.split()[1] for note in notes] == ["zeros", "ones", "arange", "full"]
    assert all("whatever the inputs' device" in note for note in notes)


def test_a_script_module_asks_its_inputs():
    x = row()
    fast = compiled(torch.jit.script(Positions().eval()), x)
    assert fast.report.notes == []
    runs_elsewhere(fast, x)


# -- dtypes -------------------------------------------------------------------------------------------------------------


def test_a_dtype_taken_from_an_input_needs_no_care_because_files_check_dtypes():
    class Typed(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.zeros(4, dtype=x.dtype)

    fast = compiled(Typed(), row())
    with pytest.raises(torch.jit.Error, match=r"must have dtype torch\.float32, got torch\.float64"):
        fast.scripted.double()(row().double())
