"""All methods of the emitted module. `forward` takes its arguments apart, checks and detaches them, and runs the chunks."""

from __future__ import annotations

from typing import Any

from torch import fx

from ir_tools.emit.calling import Structure, emitted_arguments, output_structure
from ir_tools.emit.chunks import chunk_methods, chunk_name, grouped
from ir_tools.emit.emitted_text import EmittedText, method_text
from ir_tools.emit.literals import string_literal
from ir_tools.emit.local_names import LocalNames
from ir_tools.emit.runtime_checks import CHECK_HOLDS, check_methods, input_checks
from ir_tools.emit.statements import statement
from ir_tools.emit.variables import Variables
from ir_tools.errors import EmitError
from ir_tools.ir.program import Program


def write_methods(program: Program, text: EmittedText, chunk_size: int) -> None:
    """Write the methods of `program` into `text`."""
    variables = Variables(program, text)
    # forward's arguments come first, so that they keep the user's names.
    arguments = emitted_arguments(program.signature)
    argument_locals = [variables.names.fresh(a.name) for a in arguments]
    unpack: list[str] = []
    input_locals: dict[int, str] = {}
    for argument, local in zip(arguments, argument_locals, strict=True):
        _unpack(argument.structure, local, argument.path, unpack, input_locals, variables.names)
    for i, placeholder in enumerate(program.placeholders):
        variables.name(placeholder, input_locals[i], "Tensor")

    statements = [s for node in program.calls if (s := statement(node, variables)) is not None]
    result_type, result, result_reads = _result(program, variables)
    groups = grouped(statements, chunk_size)
    text.chunks.update((chunk_name(i), group) for i, group in enumerate(groups))
    chunks, calls = chunk_methods(groups, result_reads, variables.types)

    checks = input_checks(program, input_locals, variables.names)
    detached = [f"{local} = {local}.detach()" for _, local in sorted(input_locals.items())]
    declared = [f"{local}: {a.structure.annotation}" for a, local in zip(arguments, argument_locals, strict=True)]
    forward = method_text("forward", declared, result_type, [*unpack, *checks, *detached, *calls, f"return {result}"])

    asserts = any(call.expected == CHECK_HOLDS for s in statements for call in s.calls)
    text.methods.update(check_methods(forward, bool(checks), asserts))
    text.methods.update(chunks)
    text.methods["forward"] = forward


def _unpack(structure: Structure, text: str, path: str, lines: list[str], locals_: dict[int, str], names: LocalNames) -> None:
    """Lines that take a container apart, checking what its type does not say; `locals_` gets each tensor's name."""
    if structure.kind == "tensor":
        if text not in names:
            local = names.fresh(path)
            lines.append(f"{local} = {text}")
            text = local
        locals_[structure.index] = text
        return
    name = string_literal(path)
    if structure.kind == "list":
        lines.append(f"self._check_length({name}, {len(structure.parts)}, len({text}))")
    if structure.kind == "dict":
        keys = ", ".join(map(string_literal, sorted(structure.keys)))
        lines.append(f"self._check_keys({name}, [{keys}], {text}.keys())")
    for i, part in enumerate(structure.parts):
        if structure.kind == "dict":
            key = structure.keys[i]
            _unpack(part, f"{text}[{string_literal(key)}]", f"{path}[{key!r}]", lines, locals_, names)
        else:
            _unpack(part, f"{text}[{i}]", f"{path}[{i}]", lines, locals_, names)


def _result(program: Program, variables: Variables) -> tuple[str, str, set[str]]:
    """Type and text of what forward returns, and the names it reads."""
    variables.reads = {}
    values = [_output(i, v, variables) for i, v in enumerate(program.output.args[0])]  # type: ignore[union-attr,arg-type]
    reads = set(variables.reads)
    structure = output_structure(program.signature)
    if structure is not None:
        return structure.annotation, _container_text(structure, values), reads
    if not values:
        return "None", "None", reads
    return f"Tuple[{', '.join(['Tensor'] * len(values))}]", f"({', '.join(values)},)", reads


def _output(index: int, value: Any, variables: Variables) -> str:
    if not isinstance(value, fx.Node):
        raise EmitError(f"output {index} is {value!r}, not a tensor")
    text = variables.read(value)
    if variables.types.get(text, "Tensor") != "Tensor":
        raise EmitError(f"output {index} ({value.name}) is a {variables.types[text]}, not a tensor")
    return text


def _container_text(structure: Structure, values: list[str]) -> str:
    if structure.kind == "tensor":
        return values[structure.index]
    parts = [_container_text(p, values) for p in structure.parts]
    if structure.kind == "tuple":
        return f"({', '.join(parts)},)"
    if structure.kind == "list":
        return f"[{', '.join(parts)}]"
    return "{" + ", ".join(f"{string_literal(k)}: {v}" for k, v in zip(structure.keys, parts, strict=True)) + "}"
