"""ExportedPrograms that the user gives: called as they were exported, with their sizes, guards, checks and state."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.nn import functional as F

from ir_tools.torch_compat.export import guards_of
from passes import CaptureError, DynamicShapesError, OptimizedModel, SignatureError, load, optimize

AUTO = Dim.AUTO


def exported(model: nn.Module, *args: Any, dynamic_shapes: Any = None, strict: bool = False, **kwargs: Any) -> ExportedProgram:
    return export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)


def assert_equal(fast: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*args, **kwargs), model(*args, **kwargs), atol=1e-5, rtol=1e-5)


def assert_refuses(fast: OptimizedModel, *args: Any, said: str) -> None:
    for run in (fast, fast.program):
        with pytest.raises(SignatureError) as error:
            run(*args)
        assert said in str(error.value)
    with pytest.raises(torch.jit.Error) as in_file:
        fast.scripted(*args)
    assert said in str(in_file.value)


# -- calls --------------------------------------------------------------------------------------------------------------


class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, d, *, y, z, flag=True):
        out = self.linear(x) + y - 2 * z + d["a"] / 3 + 3 * d["b"][0]
        return out if flag else x


def by_keyword(batch: int) -> tuple[tuple[Any, ...], dict[str, torch.Tensor]]:
    x, a, b, y, z = torch.randn(5, batch, 4)
    return (x, {"a": a, "b": [b]}), {"y": y, "z": z}


def test_keyword_inputs_are_bound_as_exported(tmp_path):
    model = ByKeyword().eval()
    args, kwargs = by_keyword(3)
    swapped = {"z": kwargs["z"], "y": kwargs["y"]}
    fast = optimize(exported(model, *args, **swapped), example_inputs=args, example_kwargs=kwargs)
    assert_equal(fast, model, *args, **kwargs)
    assert_equal(fast, model, *args, **swapped)
    fast.save(tmp_path / "model.pt")
    load(tmp_path / "model.pt")
    with pytest.raises(SignatureError, match="the call does not fit forward"):
        fast(*args, kwargs["y"], kwargs["z"])


def test_the_order_of_keys_in_the_example_does_not_matter():
    model = ByKeyword().eval()
    (x, d), kwargs = by_keyword(3)
    turned = {"b": d["b"], "a": d["a"]}
    fast = optimize(exported(model, x, d, **kwargs), example_inputs=(x, turned), example_kwargs=kwargs)
    assert_equal(fast, model, x, d, **kwargs)
    assert_equal(fast, model, x, turned, **kwargs)


def test_a_flag_given_by_keyword_is_baked_in():
    model = ByKeyword().eval()
    args, kwargs = by_keyword(3)
    fast = optimize(exported(model, *args, **kwargs, flag=False), example_inputs=args, example_kwargs={**kwargs, "flag": False})
    assert_equal(fast, model, *args, **kwargs, flag=False)
    with pytest.raises(SignatureError, match="input 'flag' was False when the model was captured"):
        fast(*args, **kwargs, flag=True)


def test_a_call_of_another_structure_is_refused():
    model = ByKeyword().eval()
    (x, d), kwargs = by_keyword(3)
    with pytest.raises(CaptureError, match="the model itself fails on the example inputs"):
        optimize(exported(model, x, d, **kwargs), example_inputs=(x, {"a": d["a"]}), example_kwargs=kwargs)


# -- sizes --------------------------------------------------------------------------------------------------------------


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return torch.cat([x, F.interpolate(F.max_pool2d(self.conv(x), 2), scale_factor=2.0)], 1)


def images(batch: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch, 3, height, width)


def reloaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("change", [None, reloaded, ExportedProgram.run_decompositions])
def test_sizes_and_guards_of_the_program_are_kept(strict, change):
    model = Up().eval()
    program = exported(model, images(2, 16, 16), dynamic_shapes=({0: AUTO, 2: AUTO, 3: AUTO},), strict=strict)
    fast = optimize(change(program) if change else program, example_inputs=[images(2, 16, 16), images(3, 8, 6)])
    for sizes in ((1, 16, 16), (3, 8, 12), (4, 6, 4)):
        assert_equal(fast, model, images(*sizes))
        assert_equal(fast.scripted, model, images(*sizes))
    name = str(fast.program.signature.inputs[0].shape[2])
    assert_refuses(fast, images(2, 15, 16), said=f"the sizes must meet 2 * ({name} // 2) == {name}, got {name} = 15")


class Shifted(nn.Module):
    def forward(self, x, y):
        return x[1:] + y


def test_a_size_derived_from_another():
    d = Dim("d", min=3, max=10)
    program = exported(Shifted(), torch.randn(6), torch.randn(5), dynamic_shapes=({0: d + 1}, {0: d}))
    fast = optimize(program, example_inputs=(torch.randn(6), torch.randn(5)))
    for n in (3, 7, 10):
        assert_equal(fast, Shifted(), torch.randn(n + 1), torch.randn(n))
    assert_refuses(fast, torch.randn(12), torch.randn(11), said="must be from 4 to 11, got 12")
    assert_refuses(fast, torch.randn(3), torch.randn(2), said="must be from 4 to 11, got 3")
    assert_refuses(fast, torch.randn(5), torch.randn(5), said="the sizes must meet -1 + ")


class Many(nn.Module):
    def forward(self, *xs):
        return xs[0] - 2 * xs[1]


@pytest.mark.parametrize("strict", [False, True])
def test_sizes_of_variable_arguments_are_equal_where_they_were(strict):
    program = exported(Many(), torch.randn(3), torch.randn(3), dynamic_shapes={"xs": ({0: AUTO}, {0: AUTO})}, strict=strict)
    fast = optimize(program, example_inputs=(torch.randn(3), torch.randn(3)))
    for n in (1, 2, 5):
        assert_equal(fast, Many(), torch.randn(n), torch.randn(n))
    assert_refuses(fast, torch.randn(5), torch.randn(1), said="elsewhere in the call")


class Scaled(nn.Module):
    def forward(self, x, factor):
        return x * factor + x.shape[0]


def test_dynamic_sizes_beside_a_number():
    fast = optimize(exported(Scaled(), torch.randn(3), 4, dynamic_shapes=({0: AUTO}, None)), example_inputs=(torch.randn(3), 4))
    for n in (1, 2, 5):
        assert_equal(fast, Scaled(), torch.randn(n), 4)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 4))

    def forward(self, x):
        return x + self.weight[: x.shape[0]]


def test_a_size_bounded_by_a_parameter():
    model = Positions()
    fast = optimize(exported(model, torch.randn(6, 4), dynamic_shapes=({0: AUTO},)), example_inputs=torch.randn(6, 4))
    for n in (1, 9, 10):
        assert_equal(fast, model, torch.randn(n, 4))
    assert_refuses(fast, torch.randn(11, 4), said="must be from 1 to 10, got 11")


def test_dynamic_shapes_are_not_given_twice():
    program = exported(Many(), torch.randn(3), torch.randn(3), dynamic_shapes={"xs": ({0: AUTO}, {0: AUTO})})
    with pytest.raises(DynamicShapesError, match="the sizes of an ExportedProgram were settled when it was exported"):
        optimize(program, example_inputs=(torch.randn(3), torch.randn(3)), dynamic_shapes=({0: Dim("n")}, None))


def test_a_guard_that_no_file_can_check_refuses_with_its_text():
    program = exported(Many(), torch.randn(3), torch.randn(3), dynamic_shapes={"xs": ({0: AUTO}, {0: AUTO})})
    guards_of(program).append("L['xs'][0].stride()[0] == 1")
    with pytest.raises(CaptureError) as error:
        optimize(program, example_inputs=(torch.randn(3), torch.randn(3)))
    assert "torch.export guards L['xs'][0].stride()[0] == 1, which cannot be checked" in str(error.value)


# -- checks, state, training --------------------------------------------------------------------------------------------


class Checks(nn.Module):
    def forward(self, x, y):
        n = y.max().item()
        torch._check(n >= 0)
        torch._check(n < x.shape[0])
        return x[:n]


def test_checks_of_values_are_kept():
    program = exported(Checks(), torch.randn(6, 4), torch.tensor([1, 2]), dynamic_shapes=({0: AUTO}, None))
    fast = optimize(program, example_inputs=(torch.randn(6, 4), torch.tensor([1, 2])))
    assert_equal(fast, Checks(), torch.randn(9, 4), torch.tensor([8, 2]))
    for wrong in (6, -1):
        with pytest.raises(torch.jit.Error, match="Runtime assertion failed for expression"):
            fast(torch.randn(6, 4), torch.tensor([wrong, wrong]))


class Asserts(nn.Module):
    def forward(self, x):
        torch._assert_async(x.sum() > 0, "the sum must be positive")
        return x * 2


def test_assertions_are_kept():
    x = torch.rand(3, 4)
    fast = optimize(exported(Asserts(), x), example_inputs=x)
    assert_equal(fast, Asserts(), x)
    with pytest.raises(torch.jit.Error, match="the sum must be positive"):
        fast(-x)


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total.add_(x.sum(0))
        return self.norm(x) + self.total


def test_buffers_that_the_program_moves_are_state():
    model = Counts().eval()
    program = exported(model, torch.randn(3, 4), dynamic_shapes=({0: AUTO},))
    fast = optimize(program, example_inputs=torch.randn(3, 4))
    assert fast.program.state == {"total"} and torch.equal(program.state_dict["total"], torch.zeros(4))
    for batch in (3, 1, 5):
        assert_equal(fast, model, torch.randn(batch, 4))


@pytest.mark.parametrize(
    "model, op",
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), "aten::batch_norm"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout()), "aten::dropout"),
    ],
)
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_program_exported_in_training_mode_is_refused(model, op, decomposed):
    program = exported(model.train(), images(2, 8, 8))
    program, op = (program.run_decompositions(), "aten::") if decomposed else (program, op)
    with pytest.raises(CaptureError) as error:
        optimize(program, example_inputs=images(2, 8, 8))
    assert f"the ExportedProgram was exported in training mode: {op}" in str(error.value)


def test_a_batch_norm_without_statistics_does_not_train():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Dropout(0.0)).eval()
    fast = optimize(exported(model, images(2, 8, 8)), example_inputs=images(2, 8, 8))
    assert_equal(fast, model, images(2, 8, 8))


class Chooses(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x * 2, (x,))


def test_control_flow_is_refused_by_name():
    with pytest.raises(CaptureError, match="control flow by cond is not supported yet"):
        optimize(exported(Chooses(), torch.randn(3)), example_inputs=torch.randn(3))
