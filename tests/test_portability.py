"""Which factory ops put their tensors where the inputs are, by a run of the model on wrapper tensors."""

from __future__ import annotations

import torch
from torch import nn

from ir_tools.frontends.portability import factories_behind, factories_of
from ir_tools.frontends.source import Source, prepare
from ir_tools.verify.device_placement import DevicePlacement, Factories, Made
from tests.check import captured
from tests.passes.lower.test_follow_inputs import Module, SkipsTheMask, compiled, row


def source_of(model: nn.Module, x: torch.Tensor) -> Source:
    return prepare(model.eval(), [((x,), {})])


def test_runs_on_perturbed_inputs_find_what_the_example_leaves_out():
    x = torch.rand(2, 5, 4)
    source = source_of(SkipsTheMask(), x)
    assert not factories_of(source).made
    found = factories_behind(source, captured(SkipsTheMask(), x))
    assert {(m.op, m.placement) for m in found.made} == {("zeros", DevicePlacement.FOLLOWS)}


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


def test_the_run_on_wrapper_tensors_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    factories_of(prepare(model, [((torch.rand(1, 3, 8, 8),), {})]))
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == i and torch.equal(after[name], t) for name, (i, t) in before.items())


