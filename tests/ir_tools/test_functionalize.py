"""In-place ops become pure ones: fresh literals, layouts that decide, views in place, writes that are never read."""

from typing import Final

import pytest
import torch
from torch import nn

from ir_tools.ir.dialect import short_name
from passes import CaptureError, optimize

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
