"""Values in emitted text: the variable that holds each, its type, and literals for those that are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ir_tools.emit.constants import path_text
from ir_tools.emit.emitted_text import UNREAD, EmittedText
from ir_tools.emit.literals import float_literal, plain_literal, survives_saving
from ir_tools.emit.local_names import LocalNames
from ir_tools.errors import EmitError
from ir_tools.ir.host import TENSOR
from ir_tools.ir.program import Program

_UNREAD_TEXTS = {"int": "0", "float": "0.0", "bool": "False", "str": '""', "number": "0", "Device": 'torch.device("cpu")'}


class Variables:
    """The variables of one Program's text, and which of them were read since `reads` was emptied."""

    def __init__(self, program: Program, text: EmittedText):
        self.program = program
        self.text = text
        self.names = LocalNames()
        # What each node is called in the text; several names for an op with several results.
        self.by_node: dict[fx.Node, str | tuple[str, ...]] = {}
        self.types: dict[str, str] = {}
        self.reads: dict[str, None] = {}
        self.inside: set[str] = set()  # names that exist only inside regions
        self.constants: dict[fx.Node, fx.Node] = {}  # placeholders of bodies that are given a constant, or what is hoisted

    def name(self, node: fx.Node, name: str, type_: str) -> None:
        """The value of `node` goes by `name` from here on."""
        self.by_node[node] = name
        self.types[name] = type_

    def read(self, node: fx.Node) -> str:
        """The text of a node's value, which is noted as read."""
        node = self.constants.get(node, node)
        if node in self.text.hoisted.text_of:
            return self.text.hoisted.text_of[node]
        if node.op == "get_attr":
            return path_text(self.text.paths[str(node.target)])
        name = self.known(node)
        self.reads[name] = None
        return name

    def known(self, node: fx.Node) -> str:
        """The name of a node's value, which is not noted as read."""
        name = self.by_node.get(node)
        if name is None:
            raise EmitError(f"{node.name} has no value that could be read")
        if isinstance(name, tuple):
            raise EmitError(f"{node.name} has {len(name)} results and is read as one; read them with getitem")
        return name

    def bind(self, placeholders: Sequence[fx.Node], operands: Any) -> None:
        """A value that a body reads from outside keeps the name that it has there."""
        for placeholder, operand in zip(placeholders, operands, strict=True):
            operand = self.constants.get(operand, operand)
            if operand.op == "get_attr" or operand in self.text.hoisted.text_of:
                self.constants[placeholder] = operand
            else:
                self.by_node[placeholder] = self.known(operand)

    def literal(self, value: Any, annotation: str) -> str:
        """A value of a TorchScript type; None where the type has none stands for a value that is never read."""
        if isinstance(value, fx.Node):
            return self.read(value)
        if value is None and not annotation.startswith("Optional["):
            return self._unread(annotation)
        if annotation in ("float", "Optional[float]") and isinstance(value, int):
            value = float(value)
        if isinstance(value, float):
            return float_literal(value) if survives_saving(value) else self.held_float(value)
        return plain_literal(value)

    def _unread(self, annotation: str) -> str:
        if annotation == TENSOR:
            self.text.unread = True
            return f"self.{UNREAD}"
        if annotation in _UNREAD_TEXTS:
            return _UNREAD_TEXTS[annotation]
        if annotation.startswith(("List[", "Dict[")):
            return f"torch.jit.annotate({annotation}, {'[]' if annotation.startswith('List[') else '{}'})"
        raise EmitError(f"a {annotation} that is set on one path only cannot be written in TorchScript")

    def held_float(self, value: float) -> str:
        """An attribute that holds a float which a file would not keep as one."""
        for name, known in self.text.floats.items():
            if known == value:
                return f"self.{name}"
        name = f"_float_{len(self.text.floats)}"
        self.text.floats[name] = value
        return f"self.{name}"
