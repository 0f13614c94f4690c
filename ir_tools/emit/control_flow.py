"""Regions as statements: `if`, `while` and `for`, with what their bodies read from outside and hand on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ir_tools.emit.emitted_text import Call, Statement, comment, indented
from ir_tools.emit.variables import Variables
from ir_tools.ir.host import TENSOR, fail, inner_types, value_type
from ir_tools.ir.regions import Body, bodies, region_if

InnerStatement = Callable[[fx.Node], Statement | None]


def region_statement(node: fx.Node, variables: Variables, inner_statement: InnerStatement) -> Statement:
    """A region in as many lines as it needs. `inner_statement` writes a node of its bodies."""
    types = inner_types(value_type(node))
    names = [variables.names.fresh(f"{node.name}_{i}") for i in range(len(types))]
    write = _if if node.target is region_if else _loop
    lines, reads, calls = write(node, names, types, variables, inner_statement)
    variables.types.update(zip(names, types, strict=True))
    variables.by_node[node] = tuple(names)
    return Statement(tuple(lines), tuple(reads), tuple(names), tuple(calls))


def _if(
    node: fx.Node, names: list[str], types: list[str], variables: Variables, inner_statement: InnerStatement
) -> tuple[list[str], list[str], list[Call]]:
    condition = variables.literal(node.args[0], "bool")
    reads, calls, lines = dict(variables.reads), list[Call](), list[str]()
    for opening, body in zip((f"if {condition}:{comment(node)}", "else:"), bodies(node), strict=True):
        variables.bind(body.placeholders, node.args[3])
        inner, raises = _body(body, reads, calls, variables, inner_statement)
        if not raises:
            variables.reads = {}
            given = [_result_text(v, t, variables) for v, t in zip(body.results, types, strict=True)]
            inner += [f"{name} = {text}" for name, text in zip(names, given, strict=True)]
            reads.update(variables.reads)
        lines += [opening, *indented(inner or ["pass"])]
    return lines, _from_outside(reads, variables), calls


def _loop(
    node: fx.Node, names: list[str], types: list[str], variables: Variables, inner_statement: InnerStatement
) -> tuple[list[str], list[str], list[Call]]:
    trips, condition, body, carried, operands = node.args
    assert isinstance(body, Body)
    lines = [f"{n} = {_result_text(v, t, variables)}" for n, v, t in zip(names, carried, types, strict=True)]  # type: ignore[arg-type]
    limit = None if trips is None else variables.literal(trips, "int")
    start = variables.literal(condition, "bool")
    reads, calls = dict(variables.reads), list[Call]()
    count, goes_on = variables.names.fresh("count"), variables.names.fresh("goes_on")
    number, *inputs = body.placeholders
    variables.name(number, count, "int")
    for placeholder, name, annotation in zip(inputs, names, types, strict=False):
        variables.name(placeholder, name, annotation)
    variables.bind(inputs[len(names) :], operands)
    inner, raises = _body(body, reads, calls, variables, inner_statement)
    variables.reads = {}
    counted = limit is not None and condition is True and body.results[0] is True
    if not raises:
        given = [_result_text(v, t, variables) for v, t in zip(body.results[1:], types, strict=True)]
        moved = [(name, text) for name, text in zip(names, given, strict=True) if name != text]
        if moved:  # all at once: one may be read where another is assigned
            inner.append(f"{', '.join(n for n, _ in moved)} = {', '.join(t for _, t in moved)}")
        if not counted:
            inner.append(f"{goes_on} = {variables.literal(body.results[0], 'bool')}")
    reads.update(variables.reads)
    if counted:
        lines += [f"for {count} in range({limit}):{comment(node)}", *indented(inner or ["pass"])]
    else:
        bound = "" if limit is None else f" and {count} < {limit}"
        numbered = [f"{count} = {count} + 1"] if number.users or bound else []
        lines += [f"{count} = 0"] if numbered else []
        lines += [f"{goes_on} = {start}", f"while {goes_on}{bound}:{comment(node)}"]
        lines += indented([*inner, *numbered])
    own = {*names, count, goes_on}
    return lines, [name for name in _from_outside(reads, variables) if name not in own], calls


def _body(
    body: Body, reads: dict[str, None], calls: list[Call], variables: Variables, inner_statement: InnerStatement
) -> tuple[list[str], bool]:
    """The lines of a body, and whether it ends by raising; `reads` and `calls` get what its statements have."""
    lines: list[str] = []
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        statement = inner_statement(node)
        if statement is None:
            continue
        lines += statement.lines
        reads.update(dict.fromkeys(statement.reads))
        calls += statement.calls
        variables.inside |= set(statement.writes)
        if node.target is fail:
            return lines, True
    return lines, False


def _from_outside(reads: dict[str, None], variables: Variables) -> list[str]:
    return [name for name in reads if name not in variables.inside]


def _result_text(value: Any, annotation: str, variables: Variables) -> str:
    text = variables.literal(value, annotation)
    if annotation == TENSOR or (isinstance(value, fx.Node) and variables.types.get(text) == annotation):
        return text
    return f"torch.jit.annotate({annotation}, {text})"
