"""What is known of a value, in a few characters: `f32[batch,64,56,56]`, `int = 2*batch`, `List[f32[1,8]]`."""

from __future__ import annotations

import re
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from ir_tools.ir import facts
from ir_tools.ir.facts import ListFact, ScalarFact, TensorFact, TupleFact, fact, shape
from ir_tools.ir.host import TENSOR, inner_types, value_type
from ir_tools.ir.program import Program
from ir_tools.ir.signature import DynamicSize

_SHORT_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_SYMBOL = re.compile(r"\b(?:s|u|zf|zuf)\d+\b")
_TWICE_IN_PARENTHESES = re.compile(r"\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)")
_NUMBERS_AND_TEXT = frozenset({"int", "float", "bool", "str", "number", "Scalar"})
UNKNOWN = "?"


def short_dtype(dtype: torch.dtype) -> str:
    """`f32` for `torch.float32`; the long name where there is no short one."""
    return _SHORT_DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def size_names(program: Program) -> dict[str, str]:
    """The user's names for the symbols of sizes: `{"s26": "batch"}`."""
    names: dict[str, str] = {}
    for node, spec in zip(program.placeholders, program.signature.inputs, strict=False):
        sizes = shape(node) or ()
        for declared, size in zip(spec.shape, sizes, strict=False):
            if isinstance(declared, DynamicSize) and not isinstance(size, int):
                names[str(size)] = declared.name
    return names


class Values:
    """Describes the values of one Program. Sizes that would take more than `longest` characters become `…`."""

    def __init__(self, program: Program, longest: int = 10_000):
        self.names = size_names(program)
        self.longest = longest

    def of(self, node: fx.Node) -> str:
        """The value of a node: a tensor by dtype and sizes, anything else by its TorchScript type and what is known."""
        return self._typed(value_type(node), fact(node))

    def describe(self, known: Any) -> str:
        """`f32[1,64,56,56]` for a tensor or its fact, `(f32[1], i64[1])` for several, `?` for an unknown one."""
        if isinstance(known, torch.Tensor):
            known = TensorFact.of(known)
        if isinstance(known, TensorFact):
            return f"{short_dtype(known.dtype)}[{','.join(map(self.number, known.shape))}]"
        if isinstance(known, TupleFact):
            return f"({', '.join(map(self.describe, known.parts))})"
        return UNKNOWN

    def number(self, value: Any) -> str:
        """A number; a symbolic one in the user's names for sizes, `?` where it depends on data."""
        if not isinstance(value, sympy.Basic):
            return repr(value)
        text = str(value)
        if any(symbol not in self.names for symbol in _SYMBOL.findall(text)):
            return UNKNOWN
        text = _TWICE_IN_PARENTHESES.sub(r"(\1)", _SYMBOL.sub(lambda symbol: self.names[symbol[0]], text))
        return text if len(text) <= self.longest else "…"

    def _typed(self, annotation: str, known: Any) -> str:
        if annotation == TENSOR:
            return self.describe(known)
        if annotation in _NUMBERS_AND_TEXT:
            value = self.number(known.value) if isinstance(known, ScalarFact) and known.value is not None else UNKNOWN
            return annotation if value == UNKNOWN else f"{annotation} = {value}"
        if annotation.startswith("Tuple["):
            types = inner_types(annotation)
            parts = known.parts if isinstance(known, TupleFact) and len(known) == len(types) else [facts.UNKNOWN] * len(types)
            return f"({', '.join(map(self._typed, types, parts))})"
        inside = known.elements if isinstance(known, ListFact) else known
        if isinstance(inside, TensorFact) and annotation.count(TENSOR) == 1:
            return annotation.replace(TENSOR, self.describe(inside))
        return annotation
