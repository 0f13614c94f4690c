"""The tensors that the command line makes from `--input` texts."""

import pytest
import torch

from passes.cli.example_inputs import example_input, example_inputs
from passes.errors import InputError


@pytest.mark.parametrize(
    "text, shape, dtype",
    [
        ("1x3x8x8", (1, 3, 8, 8), torch.float32),
        ("7", (7,), torch.float32),
        ("2x3:bfloat16", (2, 3), torch.bfloat16),
        ("2x3:float64", (2, 3), torch.float64),
        ("1x128:int64", (1, 128), torch.int64),
        ("4x4:uint8", (4, 4), torch.uint8),
        ("4x4:bool", (4, 4), torch.bool),
        ("scalar:int64", (), torch.int64),
        ("0x3", (0, 3), torch.float32),
    ],
)
def test_inputs_have_the_shape_and_dtype_asked_for(text, shape, dtype):
    tensor = example_input(text)
    assert tuple(tensor.shape) == shape and tensor.dtype == dtype


@pytest.mark.parametrize("text, below", [("1000:int64", 100), ("9000:int64:3000", 3000), ("9000:int64<3000", 3000)])
def test_integers_fill_their_range(text, below):
    values = example_input(text)
    assert values.min() >= 0 and values.max() < below
    assert values.max() > below * 0.95


def test_inputs_are_the_same_on_every_run_and_differ_from_each_other():
    first, again = example_inputs(["2x3", "2x3"]), example_inputs(["2x3", "2x3"])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,3,8,8", "'1,3,8,8' is not an input; expected a shape such as 1x3x224x224"),
        ("", "is not an input"),
        ("1x3x", "is not an input"),
        ("1x-3", "is not an input"),
        ("1x3:float31", "'float31' in '1x3:float31' is not a dtype; expected one of float32, "),
        ("1x3:quint8", "is not a dtype"),
        ("1x3:float32:7", "only integers have a bound"),
        ("1x3:int8:129", "asks for integers below 129, which int8 cannot give"),
        ("1x3:int64:0", "asks for integers below 0"),
    ],
)
def test_what_is_no_input_is_reported(text, message):
    with pytest.raises(InputError) as error:
        example_input(text)
    assert message in str(error.value)
