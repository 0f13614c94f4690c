"""What the command line calls a model on: tensors made from `--input` texts, and the calls in a `--calibration` file.

An input is a shape, with a dtype and, for integers, a bound where wanted:

    1x3x224x224                     random floats of this shape
    8x128:bfloat16                  of this dtype
    1x128:int64                     random integers from 0 to 99
    1x128:int64:30522               random integers from 0 to 30521

Calibration calls are real data, and come from a file: `torch.save([(ids, mask), (ids, mask)], "calls.pt")`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from passes.errors import InputError

SEED = 0
_INTEGERS_BELOW = 100
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*_FLOATS, *_INTEGERS, torch.bool)}
_INPUT = re.compile(r"(?P<shape>scalar|\d+(?:x\d+)*)(?::(?P<dtype>[a-z]\w*)(?:[:<](?P<below>\d+))?)?")


def example_input(text: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """A random tensor as `text` describes it: `1x3x224x224`, `8x128:bfloat16`, `1x128:int64:30522`, `scalar` (rank 0).

    Floats are normal; integers are uniform from 0 to 99, or below the last number; booleans are coin tosses.
    Raises `InputError` when the text is none of these.
    """
    match = _INPUT.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"{text!r} is not an input; expected a shape such as 1x3x224x224, with a dtype 1x128:int64, "
            "or with integers below a bound 1x128:int64:30522"
        )
    shape = () if match["shape"] == "scalar" else tuple(map(int, match["shape"].split("x")))
    dtype = _DTYPES.get(match["dtype"] or "float32")
    if dtype is None:
        raise InputError(f"{match['dtype']!r} in {text!r} is not a dtype; expected one of {', '.join(_DTYPES)}")
    if match["below"] is not None and dtype not in _INTEGERS:
        raise InputError(f"{text!r} bounds the values of a {match['dtype']} tensor; only integers have a bound")
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    if dtype in _FLOATS:
        return torch.randn(shape, generator=generator).to(dtype)
    below = int(match["below"] or _INTEGERS_BELOW)
    if below < 1 or below - 1 > torch.iinfo(dtype).max:
        raise InputError(f"{text!r} asks for integers below {below}, which {match['dtype']} cannot give")
    return torch.randint(0, below, shape, generator=generator).to(dtype)


def example_inputs(texts: Iterable[str], seed: int = SEED) -> tuple[torch.Tensor, ...]:
    """One tensor per text, the same ones on every run."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(example_input(text, generator) for text in texts)


CALIBRATION_EXPECTED = "expected what torch.save writes of a list of calls, each a tensor, a tuple, or a dict of arguments"


def calibration_calls(path: Path) -> list[Any]:
    """The calls that a file holds, as `optimize` takes them. Nothing but tensors and containers is unpickled.

    Raises `InputError` when there is no such file, or it holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are TorchScript: the error says it
            calls = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise InputError(f"the calibration file {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises many kinds for a file that it did not write, or may not unpickle
        raise InputError(
            f"the calibration file {path} holds something else than tensors, or is damaged; {CALIBRATION_EXPECTED}"
        ) from error
    if not isinstance(calls, list):
        raise InputError(f"the calibration file {path} holds a {type(calls).__name__}; {CALIBRATION_EXPECTED}")
    return calls
