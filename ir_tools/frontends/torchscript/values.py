"""What a TorchScript value stands for during a walk.

That is a Python value known now (numbers, strings, lists, dicts, small tensors made of numbers), an fx node (a tensor, number
or container at run time), or one of the classes below.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.ir.dialect import DTYPE_NUMBERS
from ir_tools.ir.host import TENSOR

ARGUMENT = -2
"""The depth of a container that the caller of the model gave."""
ATTRIBUTE = -1
"""The depth of a container that is an attribute of a module."""
NUMBER_OF_DTYPE = {dtype: number for number, dtype in DTYPE_NUMBERS.items()}


@dataclass(frozen=True)
class ModuleValue:
    """A submodule: its TorchScript object and its path from the root."""

    module: Any
    path: str


@dataclass(eq=False)
class ObjectValue:
    """An instance of a TorchScript class, made while the model runs by the frame of that depth."""

    depth: int
    attributes: dict[str, Any] = field(default_factory=dict)


class Uninitialized:
    """What a variable holds on a path where it is not used."""

    def __repr__(self) -> str:
        return "uninitialized"


UNINITIALIZED = Uninitialized()


class TextOfData(str):
    """A message with runtime values in it, of which only the template is known."""


class Raised(Exception):
    """The graph raises, whatever the inputs are."""


class NeedsNode(Exception):
    """A region changes a container that is still a Python value of an outer frame."""

    def __init__(self, container: Any):
        super().__init__("a container must become a node")
        self.container = container


@dataclass
class Container:
    """A list or dict of the walk: the object itself, the depth of the frame that made it, its TorchScript type."""

    value: Any
    depth: int
    annotation: str


def leaf_types(type_: Any) -> list[str]:
    """The TorchScript types of a value's parts: a tuple is taken apart."""
    if type_.kind() == "TupleType":
        return [leaf for element in type_.elements() for leaf in leaf_types(element)]
    return [type_.annotation_str]


def type_leaves(value: Any, type_: Any) -> list[Any]:
    if type_.kind() != "TupleType":
        return [value]
    if value is UNINITIALIZED:
        return [value] * len(leaf_types(type_))
    if isinstance(value, fx.Node):
        raise CaptureError(f"a tuple out of a container ({type_.annotation_str}) is handed through control flow, not supported")
    return [leaf for part, element in zip(value, type_.elements(), strict=True) for leaf in type_leaves(part, element)]


def from_leaves(type_: Any, leaves: Iterator[Any]) -> Any:
    """The value of a type from its leaves: the inverse of `type_leaves`."""
    if type_.kind() == "TupleType":
        return tuple(from_leaves(element, leaves) for element in type_.elements())
    return next(leaves)


def is_tensor_type(annotation: str) -> bool:
    return annotation in (TENSOR, f"Optional[{TENSOR}]")


def holds(values: Any, kind: type) -> bool:
    if isinstance(values, kind):
        return True
    if isinstance(values, dict):
        return any(holds(v, kind) for v in values.values())
    return isinstance(values, (list, tuple)) and any(holds(v, kind) for v in values)


def is_small(values: Any) -> bool:
    """Tensors made from numbers (sizes, mostly) are computed now; anything large stays an op."""
    if isinstance(values, torch.Tensor):
        return values.numel() <= 16
    return not isinstance(values, (list, tuple)) or all(is_small(v) for v in values)
