"""What the variants of all kernels share: the parts of their workload key, and tensors of the example's sizes to time them on.

A variant is written once: with the `op` of a pass it builds nodes, with `OnTensors` it runs.
"""

import math
from typing import Any

import torch

from ir_tools.ir.facts import CHANNELS_LAST


def have_example_sizes(*values) -> bool:
    """The example has the sizes of all values (None stands for no operand): they do not depend on runtime values."""
    return all(v is None or None not in (v.example_shape, v.example_strides) for v in values)


def lies_channels_last(value) -> bool:
    """The value is contiguous in channels-last for the example's sizes; False where its strides are not known."""
    sizes, strides = value.example_shape, value.example_strides
    if sizes is None or strides is None or len(sizes) not in CHANNELS_LAST:
        return False
    lies = torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")
    return lies.is_contiguous(memory_format=CHANNELS_LAST[len(sizes)])


def line(*parts: str) -> str:
    """A workload key: the parts that are not empty, and the number of threads."""
    return ", ".join([*filter(None, parts), f"{torch.get_num_threads()} threads"])


def by(sizes) -> str:
    return "x".join(map(str, sizes))


def dtype_name(value) -> str:
    return str(value.dtype).removeprefix("torch.")


def spread_like(value, memory_format=None):
    """A tensor of the value's example sizes with numbers from -1 to 1. Not random ones: that state is the user's.

    Without a `memory_format` it lies in memory as the value does.
    """
    sizes = value.example_shape
    if memory_format is not None:
        return _spread(math.prod(sizes), value.dtype).reshape(sizes).contiguous(memory_format=memory_format)
    strides = value.example_strides
    reach = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides))
    return _spread(reach, value.dtype).as_strided(sizes, strides)


def _spread(count, dtype):
    return torch.linspace(-1, 1, count).to(dtype)


class OnTensors:
    """The `op` of a variant that runs at once. Only the first call prepacks, and makes what is made once."""

    def __init__(self, prepack=()) -> None:
        self._prepack = frozenset(prepack)
        self._packed: dict[str, torch.Tensor] = {}
        self._made_once: dict[Any, torch.Tensor] = {}

    def call(self, target, *args, **kwargs) -> Any:
        if target not in self._prepack:
            return target(*args, **kwargs)
        given = [id(value) if isinstance(value, torch.Tensor) else value for value in (*args, *kwargs.values())]
        key = f"{target}{given}"
        if key not in self._packed:
            self._packed[key] = target(*args, **kwargs)
        return self._packed[key]

    def once(self, make, *args) -> torch.Tensor:
        if (make, args) not in self._made_once:
            self._made_once[make, args] = make(*args)
        return self._made_once[make, args]
