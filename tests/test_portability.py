"""Device constants that the model takes from its inputs follow them again, so that `engine="aten"` files move.

A file is moved to the device "meta", which takes no accelerator: there torch refuses an op whose tensors are on two devices.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from ir_tools.frontends.portability import DevicePlacement, Factories, Made, factories_of, follow_inputs
from ir_tools.frontends.source import prepare
from ir_tools.ir import Program
from ir_tools.ir.dialect import short_name
from passes import OptimizedModel, optimize
from passes.testing import assert_facts_are_true, fingerprint
from tests.check import assert_bitwise_equal, captured

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
    moved.constants.update({name: t.to("meta") for name, t in program.constants.items()})
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
    before = fingerprint(program)
    expected = program.run(x.clone())
    after, _ = follow_inputs(program, source)
    assert fingerprint(program) == before
    assert_bitwise_equal(expected, after.run(x.clone()))
    assert_facts_are_true(after, x)
    assert (after is program) == (model in FIXED and model is not Both)
    assert follow_inputs(after, source)[0] is after


@pytest.mark.parametrize("frontend", ["export", "trace"])
def test_what_only_other_inputs_make_an_ordinary_run_do(frontend):
    x = torch.rand(2, 5, 4)
    fast = compiled(SkipsTheMask(), x, frontend)
    assert "new_zeros" in [short_name(node.target) for node in fast.program.calls]
    runs_elsewhere(fast, x)
    assert not factories_of(prepare(SkipsTheMask().eval(), [((x,), {})])).made


def test_what_was_folded_moves_as_a_constant():
    fast = optimize(OnTheCpu().eval(), example_inputs=row(), engine="aten")
    assert fast.report.notes == []
    runs_elsewhere(fast, row())


def test_a_model_without_factories_is_not_touched():
    model, x = Module().linear.eval(), torch.randn(2, 4)
    program = captured(model, x)
    assert follow_inputs(program, prepare(model, [((x,), {})])) == (program, [])


# -- files that do not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frontend", FRONTENDS)
@pytest.mark.parametrize("model, ops", [(OnTheCpu, ["ones"]), (Default, ["ones"]), (Both, ["ones"])])
def test_a_device_that_the_source_names_is_reported(model, ops, frontend):
    model, x = model().eval(), row()
    fast = compiled(model, x, frontend)
    assert device_ops(fast.program) == ops
    (note,) = [n for n in fast.report.notes if "device" in n]
    assert note.startswith("test_portability.py:")
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


# -- the run on wrapper tensors ------------------------------------------------------------------------------------------


class ReadsValues(Module):
    """Wrapper tensors hold values: a branch on them is taken as in the example."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tensor([2.0, 1.0, 1.0, 1.0], device=x.device) + x.new_tensor([1.0, 0.0, 0.0, 0.0])
        if float(y.max()) > 2.5:
            return x + torch.zeros(4, device=x.device)
        return x + torch.ones(4)


def test_values_decide_on_wrapper_tensors_as_they_do_in_the_model():
    found = factories_of(prepare(ReadsValues().eval(), [((row(),), {})]))
    assert [(m.op, m.placement) for m in found.made if m.op in ("zeros", "ones")] == [("zeros", DevicePlacement.FOLLOWS)]
    assert found.unknown == ""


class Leaves(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + torch.from_numpy(x.detach().numpy()) + torch.zeros(4)


class AssignsData(Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.linear.weight.data = x[0, :4]
        return self.linear(x)


def test_a_model_that_gives_its_parameters_other_memory_does_not_crash_the_run():
    found = factories_of(prepare(AssignsData().eval(), [((row(),), {})]))
    assert found.unknown


def test_a_model_that_wrapper_tensors_cannot_follow_is_reported_as_unknown():
    x = row()
    assert "numpy" in factories_of(prepare(Leaves().eval(), [((x,), {})])).unknown
    (note,) = [n for n in compiled(Leaves(), x, "trace").report.notes if "zeros" in n]
    assert "makes a tensor on cpu, and whether that follows the inputs is not known (" in note


def test_factories_on_one_line_must_agree():
    here, there = torch.device("cpu"), torch.device("meta")
    found = Factories([Made("a.py:1", "zeros", here), Made("a.py:1", "zeros", there), Made("a.py:1", "ones", there)])
    assert found.placement("a.py:1", "zeros") is DevicePlacement.UNKNOWN
    assert found.placement("a.py:1", "ones") is DevicePlacement.FOLLOWS
    assert found.placement("a.py:1", "full") is DevicePlacement.UNKNOWN
    assert found.placement("b.py:2", "zeros") is DevicePlacement.UNKNOWN
    assert found.placement("b.py:2", "ones") is DevicePlacement.FOLLOWS
    assert found.placement("b.py:2", "full") is DevicePlacement.UNKNOWN
    assert Factories(found.made[:1]).placement("b.py:2", "zeros") is DevicePlacement.FIXED
    assert Factories(found.made[1:]).placement("a.py:1", "full") is DevicePlacement.FOLLOWS


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


def test_the_run_on_wrapper_tensors_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    factories_of(prepare(model, [((torch.rand(1, 3, 8, 8),), {})]))
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == i and torch.equal(after[name], t) for name, (i, t) in before.items())


# -- dtypes -------------------------------------------------------------------------------------------------------------


def test_a_dtype_taken_from_an_input_needs_no_care_because_files_check_dtypes():
    class Typed(Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + torch.zeros(4, dtype=x.dtype)

    fast = compiled(Typed(), row())
    with pytest.raises(torch.jit.Error, match=r"must have dtype torch\.float32, got torch\.float64"):
        fast.scripted.double()(row().double())
