"""Emission: the text means what the Program means, and keeps meaning it after a save and a load."""

import warnings

import pytest
import torch

import passes
from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import EmitError
from tests.ir_tools.emitting import aten, build, packed_program, torchscript_source, unary


def test_an_output_that_is_no_tensor_is_refused():
    program = unary(aten.split.Tensor, 1, 0)
    with pytest.raises(EmitError, match=r"output 0 \(split\) is a List\[Tensor\], not a tensor"):
        emit(program)


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, more):
        return torch.relu(self.conv(x) + more["skip"]), x, more["skip"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
def test_results_never_require_gradients(engine, tmp_path):
    model, x, skip = Residual().eval(), torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    fast = passes.optimize(model, example_inputs=(x, {"skip": skip}), engine=engine)
    fast.save(tmp_path / "model.pt")
    x.requires_grad_(), skip.requires_grad_()
    expected = model(x, {"skip": skip})
    for module in (fast, passes.load(tmp_path / "model.pt"), torch.jit.load(tmp_path / "model.pt")):
        for _ in range(3):  # the profiling executor gives later calls other code
            results = module(x, {"skip": skip})
            torch.testing.assert_close(results, tuple(e.detach() for e in expected))
            assert not any(r.requires_grad for r in results)
            assert [r.data_ptr() for r in results[1:]] == [x.data_ptr(), skip.data_ptr()]
    assert x.requires_grad and x.grad is None and skip.requires_grad


def test_dialect_ops_are_refused_by_name():
    program = build({"x": torch.randn(2)}, lambda d, x: d.call(torch.ops.torch_passes.quant_stub.default, x, "site"))
    with pytest.raises(EmitError, match=r"still holds torch_passes::quant_stub.*run a lowering pass"):
        emit(program)


def test_the_text_is_the_same_every_time_and_reads_well():
    def program():
        torch.manual_seed(1)
        return packed_program(torch.float32)[0]

    first, second = torchscript_source(program()), torchscript_source(program())
    assert first == second
    assert "# self.packed.bias: float32[12]" in first
    assert 'self._check_input(x, "x", torch.float32, [1, 8, 9, 9], "[1, 8, 9, 9]")' in first


def test_no_warning_is_shown_and_the_filters_are_left_alone():
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        round_trip(emit(unary(aten.relu.default)))
    assert not shown and list(warnings.filters) == filters
