"""What the emitted module checks when it is called: inputs, sizes, layouts, containers, and the model's own assertions."""

from __future__ import annotations

import re

from torch import fx

from ir_tools.emit.emitted_text import method_text
from ir_tools.emit.literals import int_literal, string_literal
from ir_tools.emit.local_names import LocalNames
from ir_tools.errors import EmitError
from ir_tools.ir.alias_analysis import mutated_values
from ir_tools.ir.facts import strides
from ir_tools.ir.program import Program
from ir_tools.ir.signature import DynamicSize, InputSpec, Signature

_DTYPE_NAMES = [
    *("float32", "float64", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
    *("complex32", "complex64", "complex128"),
]

_CHECK_INPUT = """\
def _check_input(self, value: Tensor, name: str, dtype: int, shape: List[int], text: str) -> None:
    if value.dtype != dtype:
        raise RuntimeError("input '{}' must have dtype {}, got {}".format(
            name, self._dtype_name(dtype), self._dtype_name(value.dtype)))
    if value.dim() != len(shape):
        raise RuntimeError("input '{}' must have rank {} (shape {}), got rank {} (shape {})".format(
            name, len(shape), text, value.dim(), value.size()))
    for i, size in enumerate(shape):
        if size != -1 and value.size(i) != size:
            raise RuntimeError("input '{}' must have shape {} (sizes were baked in at capture), got {}".format(
                name, text, value.size()))
"""

_CHECK_SIZE = """\
def _check_size(self, value: Tensor, axis: int, place: str, expected: int, least: int, most: int, allowed: str) -> None:
    got = value.size(axis)
    if got != expected:
        raise RuntimeError("{} is {}, but it is {} elsewhere in the call".format(place, got, expected))
    if got < least or (most >= 0 and got > most):
        raise RuntimeError("{} must be {}, got {}".format(place, allowed, got))
"""

_CHECK_CONDITION = """\
def _check_condition(self, holds: bool, text: str, names: List[str], sizes: List[int]) -> None:
    if not holds:
        given: List[str] = []
        for i, name in enumerate(names):
            given.append("{} = {}".format(name, sizes[i]))
        raise RuntimeError("the sizes must meet {}, got {}".format(text, ", ".join(given)))
"""

_CHECK_LAYOUT = """\
def _check_layout(self, value: Tensor, name: str, stride: List[int]) -> None:
    if value.stride() != stride:
        raise RuntimeError("input '{}' must have strides {} as at capture, got {}: the model writes into it, and what shares "
            "its memory depends on its layout".format(name, stride, value.stride()))
"""

_CHECK_LENGTH = """\
def _check_length(self, name: str, expected: int, given: int) -> None:
    if given != expected:
        raise RuntimeError("input '{}' must have {} elements, got {}".format(name, expected, given))
"""

_CHECK_KEYS = """\
def _check_keys(self, name: str, expected: List[str], given: List[str]) -> None:
    if sorted(given) != expected:
        raise RuntimeError("input '{}' must have the keys {}, got {}".format(name, expected, sorted(given)))
"""

# TorchScript takes a call of an assertion for dead code, because it has no result; a raise stays.
_CHECK_HOLDS = """\
def _check_holds(self, holds: Tensor, message: str) -> None:
    if not bool(holds):
        raise RuntimeError(message)
"""

CHECK_HOLDS = "self._check_holds"
"""How the text calls the check of an assertion."""

_CALLED_BY_FORWARD = {
    "_check_size": _CHECK_SIZE,
    "_check_condition": _CHECK_CONDITION,
    "_check_layout": _CHECK_LAYOUT,
    "_check_length": _CHECK_LENGTH,
    "_check_keys": _CHECK_KEYS,
}


def input_checks(program: Program, input_locals: dict[int, str], names: LocalNames) -> list[str]:
    """The lines of forward that check its tensors; `input_locals` are their names by number."""
    checks = [
        f"self._check_input({input_locals[i]}, {string_literal(spec.name)}, {spec.dtype}, {_checked(spec)}, "
        f"{string_literal(spec.shape_text)})"
        for i, spec in enumerate(program.signature.inputs)
    ]
    checks += _size_checks(program.signature, input_locals, names)
    written = mutated_values(program.graph)
    checks += [
        f"self._check_layout({input_locals[i]}, {string_literal(spec.name)}, {_strides(spec, node)})"
        for i, (spec, node) in enumerate(zip(program.signature.inputs, program.placeholders, strict=True))
        if node in written
    ]
    return checks


def check_methods(forward: str, has_inputs: bool, has_assertions: bool) -> dict[str, str]:
    """The methods that do the checking, by name, as far as `forward` and the chunks call them."""
    methods: dict[str, str] = {}
    if has_inputs:
        methods["_dtype_name"] = _dtype_name_method()
        methods["_check_input"] = _CHECK_INPUT
    methods |= {name: text for name, text in _CALLED_BY_FORWARD.items() if f"self.{name}(" in forward}
    if has_assertions:
        methods["_check_holds"] = _CHECK_HOLDS
    return methods


def _size_checks(signature: Signature, input_locals: dict[int, str], local_names: LocalNames) -> list[str]:
    """Lines that check dynamic sizes: sizes of one name are equal and in range, and the conditions hold."""
    lines, names = [], dict[str, str]()
    for name, (size, locations) in signature.dynamic_sizes.items():
        local = names[name] = local_names.fresh(name)
        lines.append(f"{local} = {input_locals[locations[0][0]]}.size({locations[0][1]})")
        for i, axis in locations:
            subject = f"size {axis} of input '{signature.inputs[i].name}' ({name})"
            most, allowed = int_literal(-1 if size.most is None else size.most), string_literal(size.allowed)
            arguments = f"{axis}, {string_literal(subject)}, {local}, {size.least}, {most}, {allowed}"
            lines.append(f"self._check_size({input_locals[i]}, {arguments})")
    for condition in signature.conditions:
        text = re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), condition.text)
        keys = ", ".join(map(string_literal, condition.names))
        values = ", ".join(names[n] for n in condition.names)
        lines.append(f"self._check_condition({text}, {string_literal(condition.text)}, [{keys}], [{values}])")
    return lines


def _checked(spec: InputSpec) -> list[int]:
    """The shape for `_check_input`: -1 for what is dynamic."""
    return [-1 if isinstance(size, DynamicSize) else size for size in spec.shape]


def _strides(spec: InputSpec, node: fx.Node) -> list[int]:
    known = strides(node)
    if known is None or not all(isinstance(s, int) for s in known):
        raise EmitError(
            f"the model writes into the input '{spec.name}', whose sizes are dynamic: what shares its memory depends on them"
        )
    return list(known)


def _dtype_name_method() -> str:
    names = ", ".join(f"torch.{name}: {string_literal('torch.' + name)}" for name in _DTYPE_NAMES)
    lines = [f"names = {{{names}}}", 'return names[dtype] if dtype in names else "dtype " + str(dtype)']
    return method_text("_dtype_name", ["dtype: int"], "str", lines)
