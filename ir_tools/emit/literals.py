"""Python values as TorchScript text that reads back as the same value of the declared type."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ir_tools.errors import EmitError

_INT_MIN = -(2**63)
_INT_MAX = 2**63 - 1


def literal(value: Any, declared: Any, variable: Callable[[fx.Node], str], held: Callable[[float], str]) -> str:
    """`value` as an argument of the schema type `declared`.

    `variable` gives the text of a node's value. `held` gives the text of a float that the module must hold as an
    attribute (see `survives_saving`). Raises EmitError for a value that TorchScript cannot take.
    """
    if value is None:
        return "None"
    if isinstance(value, fx.Node):
        return variable(value)
    if declared.kind() == "OptionalType":
        declared = declared.getElementType()
    if isinstance(value, (list, tuple)):
        return _list_literal(value, declared, variable, held)
    kind = declared.kind()
    if isinstance(value, (bool, int)) and kind == "FloatType":
        value = float(value)
    if isinstance(value, bool) and kind in ("IntType", "NumberType"):
        value = int(value)
    if isinstance(value, float):
        return float_literal(value) if survives_saving(value) else held(value)
    return plain_literal(value)


def plain_literal(value: Any) -> str:
    """A value that means the same wherever it stands. Raises EmitError for one that TorchScript has no literal for."""
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        return int_literal(value)
    if isinstance(value, complex):
        return f"complex({float_literal(value.real)}, {float_literal(value.imag)})"
    if isinstance(value, str):
        return string_literal(value)
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({string_literal(str(value))})"
    raise EmitError(f"{value!r} of type {type(value).__name__} cannot be written in TorchScript")


def _list_literal(
    values: list | tuple, declared: Any, variable: Callable[[fx.Node], str], held: Callable[[float], str]
) -> str:
    if declared.kind() != "ListType":
        raise EmitError(f"the list {list(values)!r} is given where {declared.annotation_str} is declared")
    element = declared.getElementType()
    text = "[" + ", ".join(literal(v, element, variable, held) for v in values) + "]"
    # Without the annotation an empty list is List[Tensor], and the elements' own types decide about the others.
    if not values or element.kind() in ("OptionalType", "NumberType"):
        return f"torch.jit.annotate({declared.annotation_str}, {text})"
    return text


def int_literal(value: int) -> str:
    if not _INT_MIN <= value <= _INT_MAX:
        raise EmitError(f"the integer {value} does not fit into 64 bits")
    # The sign is read apart from the digits, and 2**63 does not fit.
    return f"({value + 1} - 1)" if value == _INT_MIN else str(value)


def float_literal(value: float) -> str:
    if math.isnan(value):
        return 'float("nan")'
    if math.isinf(value):
        return 'float("inf")' if value > 0 else 'float("-inf")'
    return repr(value)


def survives_saving(value: float) -> bool:
    """A saved file keeps `value` a float.

    torch's serialiser writes 1e10 as `10000000000`, which is read back as an int: it adds the decimal point only to
    integral floats that fit into 32 bits, and from 1e17 on there is an exponent.
    """
    return not (math.isfinite(value) and value.is_integer() and 2**31 - 1 <= abs(value) < 1e17)


def string_literal(value: str) -> str:
    """A double-quoted literal. Raises EmitError for what torch's serialiser does not write legibly."""
    if "\r" in value:
        raise EmitError(f"the string {value!r} holds a carriage return, which TorchScript files cannot hold")
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c >= " " else f"\\{ord(c):03o}") for c in value) + '"'
