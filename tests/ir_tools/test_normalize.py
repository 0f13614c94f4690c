"""One spelling per op, and in-place ops: fresh literals, layouts that decide, views in place, decomposed programs."""

from typing import Final

import numpy
import pytest
import torch
from torch import nn

from ir_tools.frontends.normalize import SECOND_NAMES, usual_name
from ir_tools.ir.dialect import short_name
from ir_tools.torch_compat.operators import schema_of
from passes import CaptureError, NumericsError, SignatureError, optimize
from tests.check import assert_bitwise_equal, captured, ops, outputs_of

FRONTENDS = ("export", "trace", "script", "fx")


class WritesIntoALiteral(nn.Module):
    def forward(self, x):
        total = torch.tensor([0.0, 0.0])
        total += x.sum()
        return total


class WritesBehindContiguous(nn.Module):
    def forward(self, x):
        z = x.contiguous()
        z.add_(1)
        return x * 2 + z


class UnsqueezesInPlace(nn.Module):
    def forward(self, x):
        return torch.relu(x).unsqueeze_(1) + 1


class Scaled(nn.Module):
    def forward(self, x, factor):
        return x * factor


@pytest.mark.parametrize("frontend", ["auto", *FRONTENDS])
def test_a_literal_is_new_at_every_call(frontend):
    x = torch.randn(3)
    try:
        fast = optimize(WritesIntoALiteral().eval(), example_inputs=x, frontend=frontend)
    except CaptureError as error:
        assert frontend != "auto" and "writes into a tensor that is no buffer" in str(error)
        return
    assert not fast.program.state
    for _ in range(3):
        assert torch.allclose(fast(x), x.sum().expand(2))


def test_a_model_that_writes_into_its_input_takes_it_in_the_layout_of_capture():
    """Whether `contiguous` copies, and so whether the write reaches the input, depends on the layout."""
    model = WritesBehindContiguous().eval()
    x = torch.randn(1, 3, 4, 4)
    fast = optimize(model, example_inputs=x)
    assert torch.allclose(fast(x.clone()), model(x.clone()))
    with pytest.raises(Exception, match=r"input 'x' must have strides .* as at capture"):
        fast(x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_view_in_place(frontend):
    x = torch.randn(2, 3)
    fast = optimize(UnsqueezesInPlace().eval(), example_inputs=x, frontend=frontend)
    assert torch.equal(fast(x), torch.relu(x).unsqueeze(1) + 1)


def test_a_baked_number_is_another_number_when_its_type_is():
    fast = optimize(Scaled().eval(), example_inputs=(torch.arange(3), 1))
    assert torch.equal(fast(torch.arange(3), 1), torch.arange(3))
    for other in (1.0, True):
        with pytest.raises(SignatureError, match="input 'factor' was 1 when the model was captured"):
            fast(torch.arange(3), other)


def test_a_decomposed_exported_program_is_spelled_as_any_other():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.LayerNorm(5), nn.Softmax(-1)
    ).eval()
    nn.init.uniform_(model[1].running_mean)
    x = torch.randn(1, 3, 8, 8)
    exported = torch.export.export(model, (x,)).run_decompositions()
    fast = optimize(exported, ["fuse_conv_bn"], example_inputs=x, engine="aten")
    assert len(fast.report.steps[0].rewrites) == 1
    assert {"conv2d", "linear", "layer_norm", "softmax"} <= set(fast.report.ops_left)
    assert "_native_batch_norm_legit_no_training" not in fast.report.ops_left
    assert torch.allclose(fast(x), model(x), atol=1e-5)


@torch.jit.script
def rounds_to_int(x: torch.Tensor) -> torch.Tensor:
    return x * torch.as_tensor(x, dtype=torch.int64)


class RoundsToInt(nn.Module):
    def forward(self, x):
        return rounds_to_int(x)


def test_as_tensor_keeps_its_dtype():
    x = torch.tensor([1.7, -2.2])
    fast = optimize(RoundsToInt().eval(), example_inputs=x, frontend="script", verify="off")
    assert torch.equal(fast(x), x * x.to(torch.int64))


def test_a_pass_that_swaps_classes_is_caught_however_large_the_products_are():
    from ir_tools.ir import Draft
    from ir_tools.ir.dialect import aten
    from passes import graph_pass

    @graph_pass(declares="lower_precision")
    def swap_classes(program, journal):
        draft = Draft.of(program)
        last = draft.program.calls[-1]
        if str(last.target) != "aten.flip.default":
            draft.insert_after(last, list(last.users), "swap_classes", aten.flip.default, [1])
        return draft.finish()

    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1)).eval()
    x = torch.randn(2, 8) * 1000
    with pytest.raises(NumericsError, match="swap_classes"):
        optimize(model, ["cast_half", swap_classes], example_inputs=x)


# -- second names -----------------------------------------------------------------------------------------------------------


class SecondNames(nn.Module):
    def forward(self, x, y):
        z = torch.divide(torch.multiply(x, y), 2.0, rounding_mode="floor").subtract_(1)
        z = torch.concat([torch.clip(z, min=-1.0), torch.arctan2(x, y).negative()])
        return torch.where(torch.less(z, 0), torch.special.expit(z).swapaxes(0, 1).swapaxes(0, 1), torch.absolute(z))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_second_names_are_spelled_as_the_first(frontend):
    model, args = SecondNames().eval(), (torch.randn(3, 4), torch.rand(3, 4) + 1)
    fast = optimize(model, [], example_inputs=args, frontend=frontend, engine="aten")
    torch.testing.assert_close(fast(*args), model(*args))
    named = {short_name(node.target) for node in fast.program.calls}
    assert named == {"div", "mul", "sub", "cat", "clamp", "atan2", "neg", "where", "lt", "sigmoid", "transpose", "abs"}


@pytest.mark.parametrize("second", SECOND_NAMES)
def test_a_second_name_is_what_torchscript_reads_it_as(second):
    overloads = [getattr(getattr(torch.ops.aten, second), name) for name in getattr(torch.ops.aten, second).overloads()]
    usual = [usual_name(target) for target in overloads if not schema_of(target).overload_name.endswith("out")]
    assert SECOND_NAMES[second] in map(short_name, usual)
    assert all(usual_name(target) is target for target in usual)


# -- writes that nobody reads -----------------------------------------------------------------------------------------------


class KeepsNotes(nn.Module):
    """Writes into views of memory of its own, and returns it when asked to, as models do with attention weights."""

    asked: Final[bool]

    def __init__(self, asked: bool):
        super().__init__()
        self.asked = asked
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        notes = torch.zeros(2, 3)
        for i in range(2):
            notes[i, 1:] = x[i, 1:] * 2
            notes[i].view(-1)[:1].add_(x[i, 0])
        self.seen[:1].add_(1)
        if self.asked:
            return x + 1, notes
        else:
            return x + 1, x


@pytest.mark.parametrize("frontend", ["export", "trace", "script"])
@pytest.mark.parametrize("asked", [False, True])
def test_writes_are_dropped_where_nobody_reads_them(frontend, asked):
    model, x = KeepsNotes(asked).eval(), torch.randn(2, 3)
    expected = model(x)
    model.seen.zero_()
    fast = optimize(model, [], example_inputs=x, frontend=frontend, engine="aten")
    torch.testing.assert_close(fast(x), expected)
    assert dict(fast.scripted.named_buffers())["seen"].tolist() == [1, 0]  # state is read by the next call
    assert ("zeros" in {short_name(node.target) for node in fast.program.calls}) == asked


class CastsALiteral(nn.Module):
    """A trace holds what numpy gave as a tensor, and its cast as an op."""

    def forward(self, x):
        places = numpy.arange(40, dtype=numpy.int32).reshape(4, 10) % 3
        return x[torch.tensor(places, device=x.device, dtype=torch.long)]


def test_a_cast_of_a_literal_is_captured():
    x = torch.randn(3, 4)
    fast = optimize(CastsALiteral().eval(), (), example_inputs=x, frontend="trace")
    assert torch.equal(fast(x), CastsALiteral()(x))


class Normalizes(nn.Module):
    """`Tensor.norm` is linalg_vector_norm in Python, aten::norm in TorchScript."""

    def forward(self, x):
        return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_a_norm_is_a_vector_norm_in_every_front_end(frontend):
    x = torch.randn(3, 40)
    fast = optimize(Normalizes().eval(), (), example_inputs=x, frontend=frontend, engine="aten")
    assert [short_name(n.target) for n in fast.program.calls][:1] == ["linalg_vector_norm"]
    assert torch.equal(fast(x), Normalizes()(x))


NORMS = {
    "Scalar": lambda x: torch.ops.aten.norm.Scalar(x, 3),
    "Scalar_without_order": lambda x: torch.ops.aten.norm.Scalar(x),
    "ScalarOpt_dtype": lambda x: torch.ops.aten.norm.ScalarOpt_dtype(x, None, dtype=torch.float64),
    "ScalarOpt_dim": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, 1.5, [0, 2], True),
    "ScalarOpt_dim_without_order": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, None, [1]),
    "ScalarOpt_dim_over_all": lambda x: torch.ops.aten.norm.ScalarOpt_dim(x, float("-inf"), []),
    "ScalarOpt_dim_dtype": lambda x: torch.ops.aten.norm.ScalarOpt_dim_dtype(x, 2, [-1], False, dtype=torch.float64),
}


class Norm(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_is_the_same_to_the_bit(name):
    x = torch.randn(7, 33, 65)
    model = Norm(NORMS[name]).eval()
    fast = optimize(model, (), example_inputs=x, frontend="trace", engine="aten")
    assert [short_name(n.target) for n in fast.program.calls] == ["linalg_vector_norm"]
    assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("frontend", ["export", "trace", "script"])
def test_reshape_as_reads_sizes_alone(frontend):
    """The other tensor is no operand: it may be folded away."""

    class As(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x.reshape_as(y) + x.view_as(y)

    x, y = torch.randn(2, 6), torch.randn(3, 4)
    model = As().eval()
    program = captured(torch.jit.script(model) if frontend == "script" else model, x, y, frontend=frontend)
    assert ops(program) == ["reshape", "reshape", "add"]
    assert_bitwise_equal([model(x, y)], outputs_of(program, x, y))
