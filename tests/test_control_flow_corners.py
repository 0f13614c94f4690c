"""Corners of control flow: every model of `tests/control_flow_corners`, on inputs for all paths.

Every model is captured on each input, optimised, and called several times on all of them in turn (TorchScript's optimiser comes
in with the second call), against the eager model called in the same order.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ir_tools.frontends.capture import capture
from ir_tools.frontends.source import prepare
from ir_tools.torch_compat import pytree
from passes import optimize
from passes.errors import EmitError
from tests.check import with_random_statistics
from tests.control_flow_corners import buffers, containers, early_exits, memory, numbers_and_strings, sizes_and_names
from tests.control_flow_corners.corner import Corner

CORNERS: dict[str, type[Corner]] = {
    name: corner
    for subject in (memory, buffers, containers, early_exits, numbers_and_strings, sizes_and_names)
    for name, corner in vars(subject).items()
    if isinstance(corner, type) and issubclass(corner, Corner) and corner is not Corner
}

VALUES = torch.tensor([[0.2, 0.9, 0.4], [0.7, 0.1, 0.6]])
INPUTS = [VALUES, -VALUES, VALUES * 10]
IMAGES = [s * torch.linspace(-0.4, 1.2, 50).view(1, 2, 5, 5) for s in (1.0, -1.0, 3.0)]


def inputs_of(name: str) -> list[Tensor]:
    return IMAGES if name == "ConvWeight" else INPUTS


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model returns for a copy of `x`, which it may write into; copies, because it may return that."""
    with torch.no_grad():
        return [t.clone() for t in pytree.tree_leaves(model(x.clone()))]


def assert_agrees(model: nn.Module, fast: nn.Module, inputs: list[Tensor], within: float) -> None:
    eager = copy.deepcopy(model)
    for call in range(3):
        for i, x in enumerate(inputs):
            for expected, got in zip(outputs(eager, x), outputs(fast, x), strict=True):
                atol = within * expected.float().abs().amax().item()
                torch.testing.assert_close(got, expected, rtol=within, atol=atol, msg=lambda m: f"call {call}, input {i}: {m}")  # noqa: B023


def test_there_are_corners() -> None:
    assert len(CORNERS) > 50


NOT_EMITTED = frozenset(
    "ListTakesTensor ListTakesTensorLoop DictTakesTensor FoldedIntoList LiteralIntoList IfInLoopWithState".split()
)
"""They write into a tensor that a runtime list or dict holds: torch's optimiser of TorchScript may drop such writes."""
EMITTED = [name for name in CORNERS if name not in NOT_EMITTED]


@pytest.mark.parametrize("name", sorted(NOT_EMITTED))
def test_what_torchscript_may_lose_is_captured_and_not_emitted(name: str) -> None:
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    program = capture(prepare(torch.jit.script(copy.deepcopy(model)), [((inputs[0],), {})]), "script").program
    eager = copy.deepcopy(model)
    for x in inputs:
        expected = outputs(copy.deepcopy(eager), x)  # a Program starts each run from the state that was captured
        for e, got in zip(expected, program.run(x.clone()), strict=True):
            torch.testing.assert_close(got, e, rtol=1e-5, atol=1e-5)
    with pytest.raises(EmitError, match="writes into a tensor that a list or dict holds"):
        optimize(torch.jit.script(copy.deepcopy(model)), example_inputs=inputs[0], engine="aten")


@pytest.mark.parametrize("name", EMITTED)
@pytest.mark.parametrize("example, engine", [(0, "aten"), (1, "onednn_ops")])
def test_every_path_agrees(name: str, example: int, engine: str) -> None:
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    fast = optimize(torch.jit.script(copy.deepcopy(model)), example_inputs=inputs[example], engine=engine)
    assert_agrees(model, fast, inputs, 1e-5)


ILL_CONDITIONED = frozenset({"NegativeStep", "FloatMath"})
"""They cancel large numbers, or take steps by the value of a sum: half precision moves them far, as it should."""


@pytest.mark.parametrize("name", [name for name in EMITTED if name not in ILL_CONDITIONED])
def test_every_path_agrees_in_half_precision(name: str) -> None:
    """Casts inside of branches and loops must not cut what shares memory with the outside."""
    model, inputs = with_random_statistics(CORNERS[name]()), inputs_of(name)
    scripted = torch.jit.script(copy.deepcopy(model))
    given = {"example_inputs": inputs[0], "calibration_data": inputs}  # what no call runs would stay float
    fast = optimize(scripted, ["fuse_conv_bn_relu", "cast_half"], engine="aten", verify="off", **given)
    assert_agrees(model, fast, inputs, 5e-2)
