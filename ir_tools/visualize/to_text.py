"""A Program as text, one line per node:

    conv2d_1 = conv2d(input=relu, weight=layer1.0.conv1.weight, padding=[1, 1]) : f32[1,64,56,56]  # layer1.0.conv1

Arguments that have their schema's default are left out; constants go by the name of the user's parameter. What an if or a
loop runs is indented under it, with what goes in and what comes out:

    loop while Bool, at most 4 times:  # region_loop
        carried loop1_carried0 = relu : f32[batch,6]        what it is in the first round
        operand loop1_scale = scale : float
        loop1_mul = mul(self=loop1_carried0, other=loop1_scale) : f32[batch,6]
        next loop1_carried0 = loop1_mul                     what it is in the round after this one
        again while loop1_Bool
    result region_loop_0 = loop1_carried0 : f32[batch,6]    what it is in the end
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from torch import fx

from ir_tools.ir.dialect import argument_names, bound_arguments, short_name
from ir_tools.ir.host import fail
from ir_tools.ir.program import Program
from ir_tools.ir.provenance import location, record
from ir_tools.ir.regions import Body, inputs_of, region_loop
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.visualize.control import carried_count, is_result, is_whole, parts, region_text, result_nodes
from ir_tools.visualize.values import Values


@lru_cache(maxsize=4096)
def _defaults(target: OpOverload) -> dict[str, Any]:
    return {a.name: a.default_value for a in schema_of(target).arguments if a.has_default_value()}


def stated_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call, by schema name, that differ from their defaults."""
    if not isinstance(node.target, OpOverload):
        # Dumps are also drawn of graphs that a user's pass broke, so nothing is assumed about other targets.
        return bound_arguments(node) if len(node.args) == 2 else {str(i): a for i, a in enumerate(node.args)}
    if len(node.args) > len(argument_names(node.target)[0]):
        return {str(i): a for i, a in enumerate(node.args)} | dict(node.kwargs)
    defaults = _defaults(node.target)
    return {k: v for k, v in bound_arguments(node).items() if k not in defaults or not _same(v, defaults[k])}


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, (list, tuple)) and isinstance(default, (list, tuple)):
        return list(value) == list(default)
    # `True == 1` and `1 == 1.0`, but a schema distinguishes them.
    return type(value) is type(default) and value == default


def argument_text(value: Any) -> str:
    """An argument as it is written in a listing: nodes and constants by name, everything else as Python."""
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(argument_text, value))}]"
    return repr(value)


def node_text(node: fx.Node) -> str:
    """One node without its name, fact and module: `conv2d(input=x, weight=conv1.weight)`."""
    if node.op == "output":
        return ", ".join(map(argument_text, node.args[0]))  # type: ignore[union-attr, arg-type]
    if node.op != "call_function":
        return f"{node.op} {node.target}"
    if is_whole(node):
        return region_text(node, argument_text)
    stated = {k: argument_text(v) for k, v in stated_arguments(node).items()}
    arguments = ", ".join(v if k.isdecimal() else f"{k}={v}" for k, v in stated.items())
    return f"{short_name(node.target)}({arguments})"


class _Listing:
    """The lines of one Program."""

    def __init__(self, program: Program):
        self.program = program
        self.values = Values(program)

    def lines(self) -> Iterator[str]:
        program = self.program
        by = f", captured by {program.frontend}" if program.frontend else ""
        yield f"# {len(program)} ops, {len(program.used_constants())} constants{by}"
        for size, _locations in program.signature.dynamic_sizes.values():
            yield f"# size {size.name}: {size.least} or more" + (f", {size.most} at most" if size.most else "")
        for condition in program.signature.conditions:
            yield f"# must hold: {condition.text}"
        for node in program.placeholders:
            yield f"input {node.name} : {self.values.of(node)}"
        yield from self._steps(program.graph)
        for node in program.graph.find_nodes(op="output"):
            yield f"return {node_text(node)}"

    def _steps(self, graph: fx.Graph) -> Iterator[str]:
        """The constants that a graph reads, and what it computes."""
        for node in graph.nodes:
            if node.op == "get_attr":
                yield self._constant(str(node.target))
            elif is_whole(node):
                yield from self._region(node)
            elif node.op not in ("placeholder", "output") and not is_result(node):
                module = f"  # {location(node)}" if record(node).captured.module else ""
                value = "never" if node.target is fail else self.values.of(node)
                yield f"{node.name} = {node_text(node)} : {value}{module}"

    def _constant(self, name: str) -> str:
        state = "  # state" if name in self.program.state else ""
        return f"constant {name} : {self.values.describe(self.program.constants.get(name))}{state}"

    def _region(self, node: fx.Node) -> Iterator[str]:
        module = f", {location(node)}" if record(node).captured.module else ""
        yield f"{node_text(node)}:  # {node.name}{module}"
        if node.target is region_loop:
            yield from _indented(self._round(node, parts(node)[0][1]))
            yield from self._results(node, parts(node)[0][1].placeholders[1:])
            return
        for label, body in parts(node):
            lines = [*self._taken_in(node, body), *self._steps(body.graph), *self._results(node, body.results)]
            yield f"{INDENT}{label}:" + ("" if lines else " nothing")
            yield from _indented(_indented(lines))

    def _taken_in(self, node: fx.Node, body: Body) -> Iterator[str]:
        """What the placeholders of a body are, those that have users."""
        carried = carried_count(node)
        for i, (placeholder, given) in enumerate(zip(body.placeholders, inputs_of(node), strict=True)):
            if node.target is region_loop and i == 0:
                word, value = "round", " = 0, 1, 2, …"
            else:
                word, value = "carried" if i <= carried and carried else "operand", f" = {argument_text(given)}"
            if placeholder.users or word == "carried":
                yield f"{word} {placeholder.name}{value} : {self.values.of(placeholder)}"

    def _round(self, node: fx.Node, body: Body) -> Iterator[str]:
        yield from self._taken_in(node, body)
        yield from self._steps(body.graph)
        again, *following = body.results
        for placeholder, value in zip(body.placeholders[1:], following, strict=False):
            if value is not placeholder:
                yield f"next {placeholder.name} = {argument_text(value)}"
        if again is not True:
            yield f"again while {argument_text(again)}"

    def _results(self, node: fx.Node, values: Iterable[Any]) -> Iterator[str]:
        """The results of a region that have users."""
        for i, value in enumerate(values):
            for result in result_nodes(node, i):
                yield f"result {result.name} = {argument_text(value)} : {self.values.of(result)}"


INDENT = "    "


def _indented(lines: Iterable[str]) -> Iterator[str]:
    return (INDENT + line for line in lines)


def to_text(program: Program) -> str:
    """A readable listing of `program`: inputs and constants, one line per op in order of execution, outputs."""
    return "\n".join(_Listing(program).lines()) + "\n"
