"""A trace of a model that reads tensor values in Python: refused by auto; where asked for, tried on perturbed inputs."""

import pytest
import torch
from torch import nn

from passes import CaptureError, optimize


class EarlyExit(nn.Module):
    """Branches on its data: a trace holds one side only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class HarmlessCheck(nn.Module):
    """Reads a value in Python, but computes the same whatever it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not bool(x.isnan().any())
        return torch.relu(x)


class ReadsEqual(nn.Module):
    """Compares tensors by a function that the tracer does not warn about."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y if torch.equal(x, y) else x * y


def test_auto_refuses_a_trace_of_a_model_that_reads_values():
    with pytest.raises(CaptureError, match=r"trace: .*forward reads tensor values in Python \(_local_scalar_dense\)"):
        optimize(EarlyExit().eval(), example_inputs=torch.rand(2, 4))
    with pytest.raises(CaptureError, match=r"trace: .*forward reads tensor values in Python \(equal\)"):
        optimize(ReadsEqual().eval(), example_inputs=(torch.rand(2, 4), torch.rand(2, 4)))


class ReadsThroughNumpy(nn.Module):
    """Leaves torch: only the tracer's own warning tells."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(x.detach().numpy().max())


def test_auto_refuses_a_trace_that_went_through_numpy():
    with pytest.raises(CaptureError, match=r"trace: .*forward reads tensor values in Python \(numpy\)"):
        optimize(ReadsThroughNumpy().eval(), example_inputs=torch.rand(2, 4))


def test_buffers_are_no_reason_to_refuse_a_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    report = optimize(model, example_inputs=torch.rand(1, 3, 8, 8), frontend="trace").report
    assert report.notes == []


def test_a_trace_that_was_asked_for_says_that_it_is_wrong():
    report = optimize(EarlyExit().eval(), example_inputs=torch.rand(2, 4), frontend="trace").report
    assert any("wrong for other inputs" in note for note in report.notes)


def test_a_harmless_tracer_warning_is_said_to_be_harmless():
    report = optimize(HarmlessCheck().eval(), example_inputs=torch.rand(2, 4), frontend="trace").report
    assert any("agrees with the model on 3 sets of perturbed inputs" in note for note in report.notes)


def test_capturing_prints_nothing(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(CaptureError):
        optimize(EarlyExit().eval(), example_inputs=torch.rand(2, 4))
    out, err = capfd.readouterr()
    assert out == ""
    assert err == ""
