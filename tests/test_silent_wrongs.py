"""Models that once came out silently wrong, or were refused for a wrong reason: each is right, or refused with its reason."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from passes import optimize
from passes.errors import CaptureError


class LiteralWrittenInABranch(nn.Module):
    def forward(self, x):
        t = torch.tensor([1.0, 2.0, 3.0])
        if bool(x.mean() < 0):
            t[0] = 5.0
        return x * t


class LiteralWrittenInALoop(nn.Module):
    def forward(self, x):
        t = torch.tensor([1.0, 2.0, 3.0])
        while bool(x.sum() + t.sum() < 20):
            t[0].add_(5)
        return x * t


@pytest.mark.parametrize("model", [LiteralWrittenInABranch(), LiteralWrittenInALoop()], ids=lambda m: type(m).__name__)
def test_a_tensor_of_numbers_written_on_one_path_is_refused(model):
    with pytest.raises(CaptureError, match="writes into a tensor that is no buffer"):
        optimize(torch.jit.script(model.eval()), example_inputs=-torch.rand(3) - 0.1)


class CutsLongBatches(nn.Module):
    def forward(self, x):
        x = x / x.size(1) ** 0.5
        return x[:64] if x.shape[0] > 64 else x


def test_auto_takes_no_trace_of_a_decision_on_a_dynamic_size():
    model, shapes = CutsLongBatches().eval(), {"x": {0: Dim("b"), 1: Dim("c")}}
    fast = optimize(model, example_inputs=torch.randn(4, 3), dynamic_shapes=shapes)
    assert fast.report.frontend != "trace"
    for size in (1, 5, 64):
        x = torch.randn(size, 3)
        torch.testing.assert_close(fast(x), model(x))
    x = torch.randn(99, 3)
    try:
        torch.testing.assert_close(fast(x), model(x))
    except Exception as error:  # the file says that it does not take this size
        assert "64" in str(error) and "b" in str(error)


class BranchesOnUnique(nn.Module):
    def forward(self, x):
        return x * 2 if torch.unique(x).shape[0] < 3 else x


def test_auto_takes_no_trace_that_depends_on_data_through_a_size():
    try:
        fast = optimize(BranchesOnUnique().eval(), example_inputs=torch.arange(6.0))
    except CaptureError as error:
        assert "the size of" in str(error)
        return
    torch.testing.assert_close(fast(torch.ones(6)), torch.full((6,), 2.0))


class Appends(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x):
        self.seen.append(x)
        return torch.stack(self.seen).sum(0)


class CountsInPython(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x * 2 if self.n % 4 == 3 else x


@pytest.mark.parametrize("model", [Appends(), CountsInPython()], ids=lambda m: type(m).__name__)
def test_state_in_python_attributes_is_refused(model):
    with pytest.raises(CaptureError, match=r"forward keeps state in self\.(seen|n), which changes from call to call"):
        optimize(model.eval(), example_inputs=torch.rand(3))
    assert not getattr(model, "seen", []) and not getattr(model, "n", 0)


class RemembersTheSize(nn.Module):
    """Sets attributes at every call, always to the same."""

    def forward(self, x):
        self.size = x.shape[0]
        return x * self.size


def test_what_is_merely_remembered_is_no_state():
    x = torch.rand(3)
    torch.testing.assert_close(optimize(RemembersTheSize().eval(), example_inputs=x, frontend="trace")(x), x * 3)


class ReturnsItsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("sum", torch.zeros(3))

    def forward(self, x):
        self.sum += x
        return self.sum


@pytest.mark.parametrize("frontend", ["export", "trace", "script"])
def test_a_buffer_that_was_written_can_be_returned(frontend):
    model = ReturnsItsBuffer().eval()
    fast, eager = optimize(model, example_inputs=torch.rand(3), frontend=frontend), copy.deepcopy(model)
    for _ in range(3):
        x = torch.rand(3)
        torch.testing.assert_close(fast(x).clone(), eager(x).clone())


class ScalesByCount(nn.Module):
    def forward(self, x):
        return x * x.numel()


@pytest.mark.parametrize("frontend", ["export", "script"])
def test_a_number_of_the_run_scales_a_tensor(frontend):
    shapes = {"x": {0: Dim("b")}}
    fast = optimize(ScalesByCount().eval(), example_inputs=torch.rand(4, 3), dynamic_shapes=shapes, frontend=frontend)
    for size in (1, 2, 9):
        x = torch.rand(size, 3)
        torch.testing.assert_close(fast(x), x * x.numel())


@torch.jit.script
class Box:
    def __init__(self):
        self.items: list[Tensor] = []


class ListInAnObject(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        box = Box()
        items = box.items
        items.append(x)
        if bool(x.mean() > 5):
            items.append(x * 2)
        return items[-1] + box.items[-1] + len(box.items)


def test_a_list_in_an_object_stays_one_list():
    model = torch.jit.script(ListInAnObject().eval())
    fast = optimize(model, example_inputs=torch.rand(3))
    for x in (torch.rand(3), torch.rand(3) + 9):
        torch.testing.assert_close(fast(x), model(x))


class GrowsWhatItIsGiven(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        xs.append(xs[0] * 2)
        return torch.stack(xs).sum(0)


def test_a_list_of_the_callers_may_not_be_changed():
    with pytest.raises(CaptureError, match="changes a list or dict that it is given"):
        optimize(torch.jit.script(GrowsWhatItIsGiven().eval()), example_inputs=([torch.rand(3)],))


# -- layouts that passes change, and what is a view of what -------------------------------------------------------------


class WriteBesideFlatten(nn.Module):
    """Whether `flatten` copies depends on how the convolution's result lies in memory; what is written behind it tells."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 2, bias=False)
        self.transposed = transposed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = 2.0 * self.conv(x)
        flat = (y.transpose(1, 2) if self.transposed else y).flatten()
        y[..., :1].add_(1.0)
        return flat, y * 2


@pytest.mark.parametrize("transposed", [False, True], ids=["a view", "a copy"])
@pytest.mark.parametrize("frontend", ["export", "trace", "script"])
def test_a_view_stays_a_view_where_lowering_changes_layouts(frontend: str, transposed: bool) -> None:
    model, x = WriteBesideFlatten(transposed).eval(), torch.randn(2, 2, 3, 5)
    given = torch.jit.script(model) if frontend == "script" else model
    fast = optimize(given, ["lower_onednn:choose=fused"], example_inputs=x, frontend=frontend)
    assert fast.report.ops_left["_convolution_pointwise"] == 1
    for expected, got in zip(model(x), fast(x), strict=True):
        torch.testing.assert_close(got, expected)
