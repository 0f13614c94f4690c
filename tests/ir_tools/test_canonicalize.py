"""One canonical form per op: decomposed programs, casts, norms, reshapes."""

import numpy
import pytest
import torch
from torch import nn

from ir_tools.ir.dialect import short_name
from passes import optimize
from tests.check import assert_bitwise_equal, captured, ops, outputs_of

FRONTENDS = ("export", "trace", "script", "fx")


def test_a_decomposed_exported_program_is_canonicalized_as_any_other():
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


class CastsALiteral(nn.Module):
    """A trace holds what numpy gave as a tensor, and its cast as an op."""

    def forward(self, x):
        indices = numpy.arange(40, dtype=numpy.int32).reshape(4, 10) % 3
        return x[torch.tensor(indices, device=x.device, dtype=torch.long)]


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
