"""What emitted modules check when they are called: their inputs, and the model's own assertions."""

import re

import pytest
import torch

import passes
from ir_tools.emit.package import round_trip
from ir_tools.emit.to_torchscript import emit
from tests.ir_tools.emitting import assert_same, aten, build, unary


@pytest.mark.parametrize(
    "given, message",
    [
        (torch.zeros(2, 3, dtype=torch.float64), r"input 'x' must have dtype torch.float32, got torch.float64"),
        (torch.zeros(2, 3, dtype=torch.bool), r"input 'x' must have dtype torch.float32, got torch.bool"),
        (torch.zeros(3), r"input 'x' must have rank 2 \(shape \[2, 3\]\), got rank 1 \(shape \[3\]\)"),
        (torch.zeros(4, 3), r"input 'x' must have shape \[2, 3\] \(sizes were baked in at capture\), got \[4, 3\]"),
    ],
)
def test_the_module_itself_checks_its_inputs(given, message):
    scripted = emit(unary(aten.relu.default))
    for module in (scripted, round_trip(scripted)):
        for _ in range(3):  # the profiling executor gives later calls other code
            module(torch.zeros(2, 3))
            with pytest.raises(torch.jit.Error, match=message):
                module(given)


@pytest.mark.parametrize(
    "op, message",
    [
        (aten._assert_async.msg, ['not "finite": {}']),
        (aten._assert_async.default, []),
    ],
)
@pytest.mark.parametrize("chunk_size", [1, 250])
def test_an_assertion_raises_its_message(op, message, chunk_size):
    def body(d, x):
        d.call(op, d.call(aten.all.default, d.call(aten.isfinite.default, x)), *message)
        return d.call(aten.relu.default, x)

    x = torch.tensor([1.0, -2.0])
    scripted = assert_same(build({"x": x}, body), x, chunk_size=chunk_size)
    expected = message[0] if message else "an assertion of the model failed"
    for module in (scripted, round_trip(scripted), round_trip(round_trip(scripted))):
        for _ in range(3):
            assert torch.equal(module(x), x.relu())
            with pytest.raises(torch.jit.Error, match=f"RuntimeError: {re.escape(expected)}"):
                module(x / 0)


class RefusesNegative(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if bool((x < 0).any()):
            raise ValueError("negative")
        return torch.relu(self.conv(x))


class AssertsPositive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x):
        torch._assert_async((x >= 0).all(), "negative")
        return torch.relu(self.conv(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("engine", ["aten", "onednn_ops"])
@pytest.mark.parametrize("frontend", ["script", "export"])
def test_an_assertion_of_the_model_is_in_its_file(frontend, engine, tmp_path):
    model = torch.jit.script(RefusesNegative().eval()) if frontend == "script" else AssertsPositive().eval()
    x = torch.rand(1, 3, 8, 8)
    fast = passes.optimize(model, example_inputs=x, engine=engine, frontend=frontend)
    fast.save(tmp_path / "model.pt")
    for module in (fast, passes.load(tmp_path / "model.pt"), torch.jit.load(tmp_path / "model.pt")):
        with torch.no_grad():
            torch.testing.assert_close(module(x), model(x))
        with pytest.raises(Exception, match="negative"):
            module(-x)
