"""ATen's second names are captured under the first."""

import pytest
import torch
from torch import nn

from ir_tools.frontends.second_names import SECOND_NAMES, usual_name
from ir_tools.ir.dialect import short_name
from passes import optimize

FRONTENDS = ("export", "trace", "script", "fx")


class SecondNames(nn.Module):
    def forward(self, x, y):
        z = torch.divide(torch.multiply(x, y), 2.0, rounding_mode="floor").subtract_(1)
        z = torch.concat([torch.clip(z, min=-1.0), torch.arctan2(x, y).negative()])
        return torch.where(torch.less(z, 0), torch.special.expit(z).swapaxes(0, 1).swapaxes(0, 1), torch.absolute(z))


@pytest.mark.parametrize("frontend", FRONTENDS)
def test_second_names_are_captured_as_the_first(frontend):
    model, args = SecondNames().eval(), (torch.randn(3, 4), torch.rand(3, 4) + 1)
    fast = optimize(model, [], example_inputs=args, frontend=frontend, engine="aten")
    torch.testing.assert_close(fast(*args), model(*args))
    named = {short_name(node.target) for node in fast.program.calls}
    assert named == {"div", "mul", "sub", "cat", "clamp", "atan2", "neg", "where", "lt", "sigmoid", "transpose", "abs"}


@pytest.mark.parametrize("second", SECOND_NAMES)
def test_a_second_name_is_what_torchscript_reads_it_as(second):
    overloads = [getattr(getattr(torch.ops.aten, second), name) for name in getattr(torch.ops.aten, second).overloads()]
    usual = [usual_name(target) for target in overloads if not target._schema.overload_name.endswith("out")]
    assert SECOND_NAMES[second] in map(short_name, usual)
    assert all(usual_name(target) is target for target in usual)
