"""Emission: a Program as a ScriptModule.

    _chunk_0 ... _chunk_n   the calls, `chunk_size` of them in each (one huge function compiles in quadratic time)
    forward                 checks the inputs, detaches them, runs the chunks, builds the outputs
    <user's paths>          the constants, as parameters and buffers
    packed                  weights laid out for oneDNN, packed again whenever the file is loaded

The text names ops without their overloads, so after compiling every call is compared with the Program's overload.

The module is for inference: oneDNN's ops have no gradients and would give wrong ones silently, so results never require
them, whatever the inputs do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch.jit import ScriptModule

from ir_tools.emit.calling import Structure, emitted_arguments, output_structure
from ir_tools.emit.constants import build_tree, describe, free_name, path_text, place_constants
from ir_tools.emit.errors import EmitError
from ir_tools.emit.literals import spell, spell_float, spell_int, spell_plain, spell_string, survives_saving
from ir_tools.emit.local_names import LocalNames
from ir_tools.emit.packed_weights import add_packed_weights, attach_packing, packing_text
from ir_tools.emit.torch_jit import define, script_tree
from ir_tools.ir.dialect import (
    DIALECT_ONLY,
    argument_names,
    getitem,
    has_effect,
    overload_name,
    short_name,
    written_nodes,
)
from ir_tools.ir.facts import FactError, compute_fact, dtype, fact, mutated_values, storage_classes
from ir_tools.ir.host import (
    CONSTRUCTORS,
    READERS,
    TENSOR,
    fail,
    inner_types,
    is_container_type,
    is_host,
    make_dict,
    make_list,
    value_type,
)
from ir_tools.ir.origin import place
from ir_tools.ir.program import Program
from ir_tools.ir.regions import Body, bodies, is_region, region_if
from ir_tools.ir.signature import DynamicSize, InputSpec
from ir_tools.torch_compat.operators import OpOverload, schema_of, schema_or

# Namespaces whose ops stock libtorch does not know: they have to be lowered first.
_NOT_IN_LIBTORCH = frozenset({"torch_passes", "quantized_decomposed"})

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
_UNREAD_TEXTS = {"int": "0", "float": "0.0", "bool": "False", "str": '""', "number": "0", "Device": 'torch.device("cpu")'}

_ASSERTIONS = frozenset({torch.ops.aten._assert_async.default, torch.ops.aten._assert_async.msg})
_UNREAD = "_unread"
"""The attribute that a tensor variable holds on a path where nobody reads it."""
_UNNAMED_ASSERTION = "an assertion of the model failed"


def emit(program: Program, chunk_size: int = 250) -> ScriptModule:
    """A ScriptModule in eval mode that computes `program`.

    Parameters and buffers are the Program's own tensors until the module is saved or `round_trip`ped; state is a copy.
    Raises EmitError, naming the node, for what TorchScript cannot hold or reads differently.
    """
    text = _write(program, chunk_size)
    root = build_tree(program, text.paths)
    for name, value in text.floats.items():
        setattr(root, name, torch.jit.Attribute(value, float))
    if text.unread:
        setattr(root, _UNREAD, torch.jit.Attribute(torch.empty(0), torch.Tensor))
    if text.packed:
        add_packed_weights(root, text.packed_name)
    scripted = script_tree(root)
    if text.packed:
        attach_packing(getattr(scripted, text.packed_name), program, text.packed, chunk_size)
    for name, method in text.methods.items():
        _compile(scripted, name, method)
    for name, statements in text.chunks.items():
        _check_overloads(scripted, name, statements)
    return scripted


def torchscript_source(program: Program, chunk_size: int = 250) -> str:
    """The TorchScript text of `program`, for people to read: the constants as comments, then the methods."""
    text = _write(program, chunk_size)
    lines = [f"# {path_text(path)}: {describe(program.constants[name])}" for name, path in text.paths.items()]
    lines += [f"# self.{name}: {value!r}" for name, value in text.floats.items()]
    lines += [
        f"# self.{text.packed_name}.weights[{i}]: {describe(program.constants[name])} of {name}, packed"
        for i, name in enumerate(text.packed)
    ]
    methods = list(text.methods.values())
    if text.packed:
        methods.insert(0, f"# methods of self.{text.packed_name}\n" + packing_text(program, text.packed, chunk_size))
    return "\n".join(["\n".join(lines) + "\n", *methods])


# -- text --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call that the text makes: the full name of the overload, or of our method, that it must resolve to.

    `inside`: it stands in a region, where TorchScript drops what nobody reads.
    """

    node: fx.Node
    text: str
    expected: str
    inside: bool = False


@dataclass(frozen=True)
class _Statement:
    """One node in a chunk, in one line; a region has as many as it needs."""

    lines: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    calls: tuple[_Call, ...] = ()


@dataclass
class _Text:
    """Everything that emission writes. `methods` and `chunks` go by method name, `paths` by constant."""

    paths: dict[str, tuple[str, ...]]
    packed: list[str]
    packed_name: str
    floats: dict[str, float] = field(default_factory=dict)
    unread: bool = False
    methods: dict[str, str] = field(default_factory=dict)
    chunks: dict[str, list[_Statement]] = field(default_factory=dict)


def _write(program: Program, chunk_size: int) -> _Text:
    if chunk_size < 1:
        raise EmitError(f"chunk_size must be at least 1, got {chunk_size}")
    _refuse_what_libtorch_lacks(program)
    _refuse_writes_into_lists(program.graph)
    used = program.used_constants()
    paths = place_constants(name for name in used if name not in program.packings)
    packed = [name for name in used if name in program.packings]
    text = _Text(paths, packed, free_name("packed", paths.values()))
    _Writer(program, text).write(chunk_size)
    return text


def _refuse_what_libtorch_lacks(program: Program) -> None:
    left = [
        n for n in program.all_calls if n.target in DIALECT_ONLY or getattr(n.target, "namespace", "") in _NOT_IN_LIBTORCH
    ]
    if left:
        ops = ", ".join(sorted({overload_name(n.target) for n in left}))
        raise EmitError(
            f"the Program still holds {ops} (first at {place(left[0])}), which stock torch does not know; "
            "run a lowering pass such as lower_aten first"
        )


def _refuse_writes_into_lists(graph: fx.Graph) -> None:
    """Raise EmitError for a write into a tensor that a list or dict holds.

    torch 2.13's optimiser of TorchScript takes such a write for unread, and drops it from the second call on.
    """
    writers = [node for node in graph.nodes if node.op == "call_function" and written_nodes(node)]
    if writers:
        classes = storage_classes(graph.nodes)
        containers = [n for n in graph.nodes if n.op != "output" and not is_region(n) and is_container_type(value_type(n))]
        for writer in writers:
            written = {classes[target] for target in written_nodes(writer)}
            if any(classes[c] in written and _is_read_after(c, writer) for c in containers):
                raise EmitError(
                    f"{short_name(writer.target)} at {place(writer)} writes into a tensor that a list or dict holds; torch's "
                    "optimiser of TorchScript drops such writes. Put a new tensor into the list: xs[i] = f(xs[i])"
                )
    for node in graph.nodes:
        if is_region(node):
            for body in bodies(node):
                _refuse_writes_into_lists(body.graph)


def _is_read_after(container: fx.Node, writer: fx.Node) -> bool:
    """Also when it came from outside, where it may be read later."""
    return container.op == "placeholder" or any(user > writer for user in container.users)


class _Writer:
    """Writes the methods of one Program into `text`."""

    def __init__(self, program: Program, text: _Text):
        self.program = program
        self.text = text
        self.names = LocalNames()
        # What each node is called in the text; several names for an op with several results.
        self.variables: dict[fx.Node, str | tuple[str, ...]] = {}
        self.types: dict[str, str] = {}
        self.packed_index = {name: i for i, name in enumerate(text.packed)}
        self._reads: dict[str, None] = {}
        self._inside: set[str] = set()  # names that exist only inside regions
        self._constants: dict[fx.Node, fx.Node] = {}  # placeholders of bodies that are given a constant

    def write(self, chunk_size: int) -> None:
        # forward's arguments come first, so that they keep the user's names.
        arguments = emitted_arguments(self.program.signature)
        argument_locals = [self.names.fresh(a.name) for a in arguments]
        unpack: list[str] = []
        input_locals: dict[int, str] = {}
        for argument, local in zip(arguments, argument_locals, strict=True):
            self._unpack(argument.structure, local, argument.path, unpack, input_locals)
        for i, placeholder in enumerate(self.program.placeholders):
            self._name(placeholder, input_locals[i], "Tensor")

        statements = [s for node in self.program.calls if (s := self._statement(node)) is not None]
        result_type, result, result_reads = self._result()
        calls = self._chunks(statements, chunk_size, result_reads)

        checks = [
            f"self._check_input({input_locals[i]}, {spell_string(spec.name)}, {spec.dtype}, {_checked(spec)}, "
            f"{spell_string(spec.shape_text)})"
            for i, spec in enumerate(self.program.signature.inputs)
        ]
        checks += self._size_checks(input_locals)
        written = mutated_values(self.program.graph)
        checks += [
            f"self._check_layout({input_locals[i]}, {spell_string(spec.name)}, {_strides(spec, node)})"
            for i, (spec, node) in enumerate(zip(self.program.signature.inputs, self.program.placeholders, strict=True))
            if node in written
        ]
        detached = [f"{local} = {local}.detach()" for _, local in sorted(input_locals.items())]
        declared = [f"{local}: {a.structure.annotation}" for a, local in zip(arguments, argument_locals, strict=True)]
        forward = _method("forward", declared, result_type, [*unpack, *checks, *detached, *calls, f"return {result}"])

        methods = self.text.methods
        if checks:
            methods["_dtype_name"] = _dtype_name_method()
            methods["_check_input"] = _CHECK_INPUT
        if "self._check_size(" in forward:
            methods["_check_size"] = _CHECK_SIZE
        if "self._check_condition(" in forward:
            methods["_check_condition"] = _CHECK_CONDITION
        if "self._check_layout(" in forward:
            methods["_check_layout"] = _CHECK_LAYOUT
        if "self._check_length(" in forward:
            methods["_check_length"] = _CHECK_LENGTH
        if "self._check_keys(" in forward:
            methods["_check_keys"] = _CHECK_KEYS
        if any(call.expected == "self._check_holds" for s in statements for call in s.calls):
            methods["_check_holds"] = _CHECK_HOLDS
        methods.update(self._chunk_methods)
        methods["forward"] = forward

    # -- inputs and outputs --------------------------------------------------------------------------------------------

    def _unpack(self, structure: Structure, text: str, path: str, lines: list[str], locals_: dict[int, str]) -> None:
        """Lines that take a container apart, checking what its type does not say; `locals_` gets each tensor's name."""
        if structure.kind == "tensor":
            if text not in self.names:
                local = self.names.fresh(path)
                lines.append(f"{local} = {text}")
                text = local
            locals_[structure.index] = text
            return
        name = spell_string(path)
        if structure.kind == "list":
            lines.append(f"self._check_length({name}, {len(structure.parts)}, len({text}))")
        if structure.kind == "dict":
            keys = ", ".join(map(spell_string, sorted(structure.keys)))
            lines.append(f"self._check_keys({name}, [{keys}], {text}.keys())")
        for i, part in enumerate(structure.parts):
            if structure.kind == "dict":
                key = structure.keys[i]
                self._unpack(part, f"{text}[{spell_string(key)}]", f"{path}[{key!r}]", lines, locals_)
            else:
                self._unpack(part, f"{text}[{i}]", f"{path}[{i}]", lines, locals_)

    def _size_checks(self, input_locals: dict[int, str]) -> list[str]:
        """Lines that check dynamic sizes: sizes of one name are equal and in range, and the conditions hold."""
        lines, names = [], dict[str, str]()
        for name, (size, places) in self.program.signature.dynamic_sizes.items():
            local = names[name] = self.names.fresh(name)
            lines.append(f"{local} = {input_locals[places[0][0]]}.size({places[0][1]})")
            for i, axis in places:
                place = f"size {axis} of input '{self.program.signature.inputs[i].name}' ({name})"
                most, allowed = spell_int(-1 if size.most is None else size.most), spell_string(size.allowed)
                arguments = f"{axis}, {spell_string(place)}, {local}, {size.least}, {most}, {allowed}"
                lines.append(f"self._check_size({input_locals[i]}, {arguments})")
        for condition in self.program.signature.conditions:
            text = re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), condition.text)
            keys = ", ".join(map(spell_string, condition.names))
            values = ", ".join(names[n] for n in condition.names)
            lines.append(f"self._check_condition({text}, {spell_string(condition.text)}, [{keys}], [{values}])")
        return lines

    def _result(self) -> tuple[str, str, set[str]]:
        """Type and text of what forward returns, and the names it reads."""
        self._reads = {}
        values = [self._output(i, v) for i, v in enumerate(self.program.output.args[0])]  # type: ignore[union-attr,arg-type]
        reads = set(self._reads)
        structure = output_structure(self.program.signature)
        if structure is not None:
            return structure.annotation, _container_text(structure, values), reads
        if not values:
            return "None", "None", reads
        return f"Tuple[{', '.join(['Tensor'] * len(values))}]", f"({', '.join(values)},)", reads

    def _output(self, index: int, value: Any) -> str:
        if not isinstance(value, fx.Node):
            raise EmitError(f"output {index} is {value!r}, not a tensor")
        text = self._variable(value)
        if self.types.get(text, "Tensor") != "Tensor":
            raise EmitError(f"output {index} ({value.name}) is a {self.types[text]}, not a tensor")
        return text

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _name(self, node: fx.Node, name: str, type_: str) -> None:
        self.variables[node] = name
        self.types[name] = type_

    def _variable(self, node: fx.Node) -> str:
        """The text of a node's value."""
        node = self._constants.get(node, node)
        if node.op == "get_attr":
            constant = str(node.target)
            if constant in self.packed_index:
                return f"self.{self.text.packed_name}.weights[{self.packed_index[constant]}]"
            return path_text(self.text.paths[constant])
        name = self._known_variable(node)
        self._reads[name] = None
        return name

    def _known_variable(self, node: fx.Node) -> str:
        name = self.variables.get(node)
        if name is None:
            raise EmitError(f"{node.name} has no value that could be read")
        if isinstance(name, tuple):
            raise EmitError(f"{node.name} has {len(name)} results and is read as one; read them with getitem")
        return name

    def _statement(self, node: fx.Node, inside: bool = False) -> _Statement | None:
        """What computes `node`; None for a getitem that only names one of several results. `inside`: in a region."""
        self._reads = {}
        if is_region(node):
            return self._region(node)
        if node.target is getitem:
            return self._getitem(node)
        if node.target is fail:
            return _Statement((f"raise RuntimeError({spell_string(str(node.args[0]))})",), (), ())
        if node.target in CONSTRUCTORS:
            return self._named(node, self._constructed(node), value_type(node))
        if not isinstance(node.target, OpOverload):
            raise EmitError(f"{node.name} calls {node.target!r}, which is not an op")
        try:
            assertion = node.target in _ASSERTIONS
            call = self._assertion(node) if assertion else self._call(node, node.target)
        except EmitError as error:
            raise EmitError(f"{place(node)}: {overload_name(node.target)}: {error}") from None
        if assertion:
            return _Statement((call + _comment(node),), tuple(self._reads), (), (_Call(node, call, "self._check_holds"),))
        if is_host(node.target):
            if schema_of(node.target).returns and value_type(node) != "NoneType":
                return self._named(node, call, value_type(node))
            return _Statement((call + _comment(node),), tuple(self._reads), ())
        results = [r.type.annotation_str for r in schema_of(node.target).returns]
        names = [self.names.fresh(node.name if len(results) == 1 else f"{node.name}_{i}") for i in range(len(results))]
        self.types.update(zip(names, results, strict=True))
        if results:
            self.variables[node] = names[0] if len(names) == 1 else tuple(names)
            call = f"{', '.join(names)} = {call}"
        expected = _Call(node, call, overload_name(node.target), inside)
        return _Statement((call + _comment(node),), tuple(self._reads), tuple(names), (expected,))

    def _named(self, node: fx.Node, text: str, annotation: str) -> _Statement:
        """`name = text` for a value of the host."""
        name = self.names.fresh(node.name)
        self._name(node, name, annotation)
        return _Statement((f"{name} = {text}",), tuple(self._reads), (name,))

    def _constructed(self, node: fx.Node) -> str:
        """A list, tuple or dict."""
        annotation = value_type(node)
        if node.target is make_dict:
            keys, values = (list(a) for a in node.args)  # type: ignore[union-attr,arg-type]
            _, part = inner_types(annotation)
            pairs = (f"{self._literal(k, 'str')}: {self._literal(v, part)}" for k, v in zip(keys, values, strict=True))
            text = "{" + ", ".join(pairs) + "}"
        elif node.target is make_list:
            (part,) = inner_types(annotation)
            text = "[" + ", ".join(self._literal(v, part) for v in node.args) + "]"
        else:
            parts = zip(node.args, inner_types(annotation), strict=True)
            text = "(" + "".join(f"{self._literal(v, t)}, " for v, t in parts) + ")"
        return f"torch.jit.annotate({annotation}, {text})"

    def _literal(self, value: Any, annotation: str) -> str:
        """A value of a TorchScript type; None where the type has none stands for a value that nobody reads."""
        if isinstance(value, fx.Node):
            return self._variable(value)
        if value is None and not annotation.startswith("Optional["):
            return self._unread(annotation)
        if annotation in ("float", "Optional[float]") and isinstance(value, int):
            value = float(value)
        if isinstance(value, float):
            return spell_float(value) if survives_saving(value) else self._held_float(value)
        return spell_plain(value)

    def _unread(self, annotation: str) -> str:
        if annotation == TENSOR:
            self.text.unread = True
            return f"self.{_UNREAD}"
        if annotation in _UNREAD_TEXTS:
            return _UNREAD_TEXTS[annotation]
        if annotation.startswith(("List[", "Dict[")):
            return f"torch.jit.annotate({annotation}, {'[]' if annotation.startswith('List[') else '{}'})"
        raise EmitError(f"a {annotation} that is set on one path only cannot be written in TorchScript")

    # -- regions -------------------------------------------------------------------------------------------------------

    def _region(self, node: fx.Node) -> _Statement:
        types = inner_types(value_type(node))
        names = [self.names.fresh(f"{node.name}_{i}") for i in range(len(types))]
        write = self._if if node.target is region_if else self._loop
        lines, reads, calls = write(node, names, types)
        self.types.update(zip(names, types, strict=True))
        self.variables[node] = tuple(names)
        return _Statement(tuple(lines), tuple(reads), tuple(names), tuple(calls))

    def _if(self, node: fx.Node, names: list[str], types: list[str]) -> tuple[list[str], list[str], list[_Call]]:
        condition = self._literal(node.args[0], "bool")
        reads, calls, lines = dict(self._reads), list[_Call](), list[str]()
        for opening, body in zip((f"if {condition}:{_comment(node)}", "else:"), bodies(node), strict=True):
            self._bind_operands(body.placeholders, node.args[3])
            inner, raises = self._body(body, reads, calls)
            if not raises:
                self._reads = {}
                given = [self._result_text(v, t) for v, t in zip(body.results, types, strict=True)]
                inner += [f"{name} = {text}" for name, text in zip(names, given, strict=True)]
                reads.update(self._reads)
            lines += [opening, *_indented(inner or ["pass"])]
        return lines, self._from_outside(reads), calls

    def _loop(self, node: fx.Node, names: list[str], types: list[str]) -> tuple[list[str], list[str], list[_Call]]:
        trips, condition, body, carried, operands = node.args
        assert isinstance(body, Body)
        lines = [f"{n} = {self._result_text(v, t)}" for n, v, t in zip(names, carried, types, strict=True)]  # type: ignore[arg-type]
        limit = None if trips is None else self._literal(trips, "int")
        start = self._literal(condition, "bool")
        reads, calls = dict(self._reads), list[_Call]()
        count, goes_on = self.names.fresh("count"), self.names.fresh("goes_on")
        number, *inputs = body.placeholders
        self._name(number, count, "int")
        for placeholder, name, annotation in zip(inputs, names, types, strict=False):
            self._name(placeholder, name, annotation)
        self._bind_operands(inputs[len(names) :], operands)
        inner, raises = self._body(body, reads, calls)
        self._reads = {}
        counted = limit is not None and condition is True and body.results[0] is True
        if not raises:
            given = [self._result_text(v, t) for v, t in zip(body.results[1:], types, strict=True)]
            moved = [(name, text) for name, text in zip(names, given, strict=True) if name != text]
            if moved:  # all at once: one may be read in another's place
                inner.append(f"{', '.join(n for n, _ in moved)} = {', '.join(t for _, t in moved)}")
            if not counted:
                inner.append(f"{goes_on} = {self._literal(body.results[0], 'bool')}")
        reads.update(self._reads)
        if counted:
            lines += [f"for {count} in range({limit}):{_comment(node)}", *_indented(inner or ["pass"])]
        else:
            bound = "" if limit is None else f" and {count} < {limit}"
            numbered = [f"{count} = {count} + 1"] if number.users or bound else []
            lines += [f"{count} = 0"] if numbered else []
            lines += [f"{goes_on} = {start}", f"while {goes_on}{bound}:{_comment(node)}"]
            lines += _indented([*inner, *numbered])
        own = {*names, count, goes_on}
        return lines, [name for name in self._from_outside(reads) if name not in own], calls

    def _bind_operands(self, placeholders: Sequence[fx.Node], operands: Any) -> None:
        """What a body reads from outside goes by the name that it has there."""
        for placeholder, operand in zip(placeholders, operands, strict=True):
            operand = self._constants.get(operand, operand)
            if operand.op == "get_attr":
                self._constants[placeholder] = operand
            else:
                self.variables[placeholder] = self._known_variable(operand)

    def _body(self, body: Body, reads: dict[str, None], calls: list[_Call]) -> tuple[list[str], bool]:
        """The lines of a body, and whether it ends by raising; `reads` and `calls` get what its statements have."""
        lines: list[str] = []
        for node in body.graph.nodes:
            if node.op != "call_function":
                continue
            statement = self._statement(node, inside=True)
            if statement is None:
                continue
            lines += statement.lines
            reads.update(dict.fromkeys(statement.reads))
            calls += statement.calls
            self._inside |= set(statement.writes)
            if node.target is fail:
                return lines, True
        return lines, False

    def _from_outside(self, reads: dict[str, None]) -> list[str]:
        return [name for name in reads if name not in self._inside]

    def _result_text(self, value: Any, annotation: str) -> str:
        text = self._literal(value, annotation)
        if annotation == TENSOR or (isinstance(value, fx.Node) and self.types.get(text) == annotation):
            return text
        return f"torch.jit.annotate({annotation}, {text})"

    def _getitem(self, node: fx.Node) -> _Statement | None:
        container, index = node.args
        if not isinstance(container, fx.Node) or not isinstance(index, int):
            raise EmitError(f"{node.name}: getitem takes an op's results and a number, got {node.args}")
        results = self.variables.get(container)
        if isinstance(results, tuple):
            name = results[index]
            self._name(node, name, self.types[name])
            return None
        text = self._variable(container)
        type_ = self.types[text]
        if not type_.startswith(("List[", "Tuple[")):
            raise EmitError(f"{node.name} reads an element of {container.name}, which is a {type_}")
        inner = inner_types(type_)
        name = self.names.fresh(node.name)
        self._name(node, name, inner[0] if type_.startswith("List[") else inner[index])
        return _Statement((f"{name} = {text}[{index}]",), (text,), (name,))

    def _call(self, node: fx.Node, target: OpOverload) -> str:
        positional, keyword_only = argument_names(target)
        if len(node.args) != len(positional) or set(node.kwargs) != set(keyword_only):
            raise EmitError("the arguments are not spelled out in full")
        kwargs = _with_bool_dtype(self.program, node, target)
        declared = {a.name: a for a in schema_of(target).arguments}
        arguments = []
        for position, (name, value) in enumerate(zip(positional, node.args, strict=True)):
            if value is None and _is_ambiguous_none(target, position):
                arguments.append(f"torch.jit.annotate({declared[name].type.annotation_str}, None)")
            else:
                arguments.append(spell(value, declared[name].type, self._variable, self._held_float))
        for name in keyword_only:
            arguments.append(f"{name}={spell(kwargs[name], declared[name].type, self._variable, self._held_float)}")
        namespace, packet = schema_of(target).name.split("::")
        return f"torch.ops.{namespace}.{packet}({', '.join(arguments)})"

    def _assertion(self, node: fx.Node) -> str:
        holds, message = (*node.args, _UNNAMED_ASSERTION)[:2]
        if not isinstance(holds, fx.Node) or not isinstance(message, str):
            raise EmitError(f"takes a tensor and a message, got {node.args}")
        return f"self._check_holds({self._variable(holds)}, {spell_string(message)})"

    def _held_float(self, value: float) -> str:
        for name, known in self.text.floats.items():
            if known == value:
                return f"self.{name}"
        name = f"_float_{len(self.text.floats)}"
        self.text.floats[name] = value
        return f"self.{name}"

    # -- chunks --------------------------------------------------------------------------------------------------------

    def _chunks(self, statements: list[_Statement], chunk_size: int, result_reads: set[str]) -> list[str]:
        """Write the chunk methods; the lines of forward that call them."""
        groups = _grouped(statements, chunk_size)
        last_chunk_reading = {name: i for i, group in enumerate(groups) for s in group for name in s.reads}
        last_chunk_reading.update(dict.fromkeys(result_reads, len(groups)))
        self._chunk_methods: dict[str, str] = {}
        calls = []
        for i, group in enumerate(groups):
            written = [name for s in group for name in s.writes]
            inside = set(written)
            live_in = list(dict.fromkeys(name for s in group for name in s.reads if name not in inside))
            live_out = [name for name in written if last_chunk_reading.get(name, -1) > i]
            method = f"_chunk_{i}"
            self._chunk_methods[method] = self._chunk_method(method, group, live_in, live_out)
            self.text.chunks[method] = group
            call = f"self.{method}({', '.join(live_in)})"
            calls.append(f"{', '.join(live_out)} = {call}" if live_out else call)
        return calls

    def _chunk_method(self, name: str, group: list[_Statement], live_in: list[str], live_out: list[str]) -> str:
        types = [self.types[v] for v in live_out]
        returned = types[0] if len(types) == 1 else f"Tuple[{', '.join(types)}]" if types else "None"
        lines = [line for s in group for line in s.lines]
        lines.append(f"return {', '.join(live_out) or 'None'}")
        return _method(name, [f"{v}: {self.types[v]}" for v in live_in], returned, lines)


def _checked(spec: InputSpec) -> list[int]:
    """The shape for `_check_input`: -1 for what is dynamic."""
    return [-1 if isinstance(size, DynamicSize) else size for size in spec.shape]


def _strides(spec: InputSpec, node: fx.Node) -> list[int]:
    strides = fact(node).stride()
    if not all(isinstance(s, int) for s in strides):
        raise EmitError(
            f"the model writes into the input '{spec.name}', whose sizes are dynamic: what shares its memory depends on them"
        )
    return list(strides)


def _grouped(statements: Sequence[_Statement], chunk_size: int) -> list[list[_Statement]]:
    """Statements in groups of about `chunk_size` lines; one that is longer stands alone."""
    groups: list[list[_Statement]] = []
    size = chunk_size
    for statement in statements:
        if size + len(statement.lines) > chunk_size:
            groups.append([])
            size = 0
        groups[-1].append(statement)
        size += len(statement.lines)
    return groups


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _method(name: str, arguments: list[str], result: str, lines: list[str]) -> str:
    return f"def {name}({', '.join(['self', *arguments])}) -> {result}:\n" + "".join(f"    {line}\n" for line in lines)


def _dtype_name_method() -> str:
    names = ", ".join(f"torch.{name}: {spell_string('torch.' + name)}" for name in _DTYPE_NAMES)
    lines = [f"names = {{{names}}}", 'return names[dtype] if dtype in names else "dtype " + str(dtype)']
    return _method("_dtype_name", ["dtype: int"], "str", lines)


def _comment(node: fx.Node) -> str:
    path = place(node)
    return f"  # {path}" if path != node.name and path.isprintable() else ""


def _container_text(structure: Structure, values: list[str]) -> str:
    if structure.kind == "tensor":
        return values[structure.index]
    parts = [_container_text(p, values) for p in structure.parts]
    if structure.kind == "tuple":
        return f"({', '.join(parts)},)"
    if structure.kind == "list":
        return f"[{', '.join(parts)}]"
    return "{" + ", ".join(f"{spell_string(k)}: {v}" for k, v in zip(structure.keys, parts, strict=True)) + "}"


# -- overloads ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _is_ambiguous_none(target: OpOverload, position: int) -> bool:
    """Another overload declares another optional type at this position, so that a bare None could mean that one."""
    packet = target.overloadpacket
    own = schema_of(target).arguments[position].type.annotation_str
    for overload in packet.overloads():
        arguments = schema_of(getattr(packet, overload)).arguments
        if position < len(arguments):
            other = arguments[position].type
            if other.kind() == "OptionalType" and other.annotation_str != own:
                return True
    return False


def _with_bool_dtype(program: Program, node: fx.Node, target: OpOverload) -> dict[str, Any]:
    """The keyword arguments, with the dtype filled in where a bool number would otherwise decide it.

    TorchScript has no bool numbers: `full([2], True)` is read as `full([2], 1)` and gives integers.
    Raises EmitError where that cannot be said with a dtype.
    """
    kwargs = dict(node.kwargs)
    declared = {a.name: a.type for a in schema_of(target).arguments}
    given = dict(zip(argument_names(target)[0], node.args, strict=True)) | kwargs
    if not any(isinstance(v, bool) and "number" in declared[k].annotation_str for k, v in given.items()):
        return kwargs
    wanted = dtype(node)

    def as_number(name: str, value: Any) -> Any:
        return int(value) if isinstance(value, bool) and "number" in declared[name].annotation_str else value

    args = tuple(as_number(k, given[k]) for k in argument_names(target)[0])
    try:
        read = compute_fact(program.mode, target, args, {k: as_number(k, v) for k, v in kwargs.items()})
    except FactError as error:
        raise EmitError(f"a bool given as a number is an int in TorchScript: {error}") from None
    if wanted is None or not isinstance(read, torch.Tensor) or read.dtype == wanted:
        return kwargs
    if "dtype" in kwargs and kwargs["dtype"] is None:
        return kwargs | {"dtype": wanted}
    raise EmitError(
        f"a bool given as a number is an int in TorchScript and makes the result {read.dtype}, not {wanted}"
    )


def _compile(scripted: ScriptModule, name: str, text: str) -> None:
    try:
        define(scripted, text)
    except RuntimeError as error:
        raise EmitError(f"TorchScript does not accept the text of {name}:\n{str(error).strip()}") from error


def _check_overloads(scripted: ScriptModule, method: str, statements: list[_Statement]) -> None:
    """Raise EmitError unless every call of a compiled chunk means the Program's overload."""
    calls = [call for statement in statements for call in statement.calls]
    schemas = list(_resolved_schemas(getattr(scripted, method).graph))
    # A write into memory that nobody reads is dropped too, with whatever it alone needs.
    writes_inside = any(call.inside and written_nodes(call.node) for call in calls)
    at = 0
    for call in calls:
        schema = schemas[at] if at < len(schemas) else "nothing (the call is gone)"
        if schema.split("(", 1)[0] == call.expected:
            at += 1
        elif not writes_inside and (not call.inside or has_effect(call.node)):
            wanted = schema_or(call.node.target, call.expected)
            raise EmitError(
                f"TorchScript reads {call.node.name} (at {place(call.node)}) differently than it is meant\n"
                f"  meant: {wanted}\n  read:  {schema}\n  text:  {call.text}"
            )
    if at < len(schemas):
        raise EmitError(f"{method} holds a call that the Program does not have: {schemas[at]}")


def _resolved_schemas(graph: Any) -> Iterator[str]:
    """The schemas of a chunk's calls of ops on tensors, in order, those in ifs and loops among them."""
    for node in graph.nodes():
        if node.kind() == "prim::CallMethod":
            yield f"self.{node.s('name')}"
        for block in node.blocks():
            yield from _resolved_schemas(block)
        if node.kind().startswith("prim::"):
            continue
        schema = node.schema()
        if node.kind() not in READERS and "Tensor" in schema:
            yield schema
