"""A compiled model, and the file it is saved to, refuse inputs of another number, size, dtype or kind at every later call."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

from passes import SignatureError, load, optimize
from tests.models import Case, image, row, seeded
from tests.passes.driver.bad_input import model, says, small


class TwoInputs(nn.Module):
    """Takes an image and a mask; with the sizes baked in, another batch size could give numbers that are wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image, mask):
        y = self.conv(image) * mask
        return y.reshape(2, -1) if image.shape[0] == 2 else y


@pytest.fixture(scope="module", params=["aten", "onednn_ops"])
def callables(request, tmp_path_factory) -> dict[str, Any]:
    """The optimised model, its scripted module, and the saved file as torch and as we load it."""
    case = seeded(lambda: Case(TwoInputs(), (image(2, 3, 6, 6), image(2, 1, 6, 6))))
    fast = optimize(case.model, example_inputs=case.args, engine=request.param)
    path = tmp_path_factory.mktemp("files") / "two.pt"
    fast.save(path)
    callables = {"fast": fast, "scripted": fast.scripted, "file": torch.jit.load(path), "loaded": load(path)}
    for function in callables.values():
        torch.testing.assert_close(function(*case.args), case())
    return callables


IMAGE, MASK = torch.zeros(2, 3, 6, 6), torch.zeros(2, 1, 6, 6)
WRONG_CALLS = {
    "batch 4 on a file captured at batch 2": (
        (torch.zeros(4, 3, 6, 6), torch.zeros(4, 1, 6, 6)), ("'image'", "[2, 3, 6, 6]", "[4, 3, 6, 6]"),
    ),
    "batch 1, which would broadcast": ((torch.zeros(1, 3, 6, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[1, 3, 6, 6]")),
    "a mask that would broadcast": ((IMAGE, torch.zeros(1, 1, 6, 6)), ("'mask'", "[2, 1, 6, 6]", "[1, 1, 6, 6]")),
    "another height": ((torch.zeros(2, 3, 8, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[2, 3, 8, 6]")),
    "another rank": ((IMAGE, torch.zeros(6, 6)), ("'mask'", "[2, 1, 6, 6]", "[6, 6]")),
    "no batch": ((torch.zeros(3, 6, 6), MASK), ("'image'", "[2, 3, 6, 6]", "[3, 6, 6]")),
    "float64": ((IMAGE.double(), MASK), ("'image'", "float32", "float64")),
    "a mask of bool": ((IMAGE, MASK.bool()), ("'mask'", "float32", "bool")),
    "the inputs swapped": ((MASK, IMAGE), ("'image'", "[2, 3, 6, 6]", "[2, 1, 6, 6]")),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
@pytest.mark.parametrize("kind", ["fast", "scripted", "file", "loaded"])
def test_wrong_sizes_and_dtypes_raise_at_every_later_call(callables, kind, name):
    inputs, (input_name, expected, given) = WRONG_CALLS[name]
    with pytest.raises((SignatureError, torch.jit.Error, RuntimeError)) as error:
        callables[kind](*inputs)
    assert isinstance(error.value, SignatureError) == (kind == "fast")
    # TorchScript puts the message at the end of its own traceback.
    assert re.search(says(f"input {input_name} must have", expected, given), str(error.value))


@pytest.mark.parametrize(
    "inputs", [(), (IMAGE,), (IMAGE, MASK, MASK), (IMAGE, 3), (IMAGE, None), ([IMAGE], MASK)],
    ids=["none", "one", "three", "a number", "None", "a list"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["fast", "scripted", "file", "loaded"])
def test_a_wrong_number_or_kind_of_inputs_raises_at_every_later_call(callables, kind, inputs):
    named = "mask" if len(inputs) == 2 and inputs[0] is IMAGE else "image" if len(inputs) != 3 else "argument"
    with pytest.raises((SignatureError, torch.jit.Error, RuntimeError, TypeError), match=named) as error:
        callables[kind](*inputs)
    assert isinstance(error.value, SignatureError) == (kind == "fast")


@pytest.mark.parametrize("kind", ["fast", "scripted", "file", "loaded"])
def test_a_right_call_still_works_after_wrong_ones(callables, kind):
    assert callables[kind](IMAGE, MASK).shape == (2, 144)
    assert callables[kind](image=IMAGE, mask=MASK).shape == (2, 144)


@pytest.mark.parametrize("frontend", ["export", "trace", "script", "fx"])
def test_sizes_are_checked_whatever_the_front_end(frontend):
    case = small()
    case.model = model()
    fast = optimize(case.model, example_inputs=case.args, frontend=frontend)
    for function in (fast, fast.scripted):
        with pytest.raises((SignatureError, torch.jit.Error), match=says("input 'x' must have shape [2, 4]", "[4, 4]")):
            function(row(4, 4))
