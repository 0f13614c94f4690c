"""One node of a Program as a statement: calls, constructors of containers, what takes them apart, raises, regions."""

from __future__ import annotations

from functools import partial

from torch import fx

from ir_tools.emit.calls import ASSERTIONS, assertion_text, call_text
from ir_tools.emit.control_flow import region_statement
from ir_tools.emit.emitted_text import Call, Statement, comment
from ir_tools.emit.literals import string_literal
from ir_tools.emit.runtime_checks import CHECK_HOLDS
from ir_tools.emit.variables import Variables
from ir_tools.errors import EmitError
from ir_tools.ir.dialect import getitem, overload_name
from ir_tools.ir.host import CONSTRUCTORS, fail, inner_types, is_host, make_dict, make_list, value_type
from ir_tools.ir.provenance import location
from ir_tools.ir.regions import is_region
from ir_tools.torch_compat.operators import OpOverload, schema_of


def statement(node: fx.Node, variables: Variables, inside: bool = False) -> Statement | None:
    """What computes `node`; None for what is hoisted, and for a getitem that only names one of several results.

    `inside`: in a region.
    """
    variables.reads = {}
    if node in variables.text.hoisted.text_of:
        return None
    if is_region(node):
        return region_statement(node, variables, partial(statement, variables=variables, inside=True))
    if node.target is getitem:
        return _getitem(node, variables)
    if node.target is fail:
        return Statement((f"raise RuntimeError({string_literal(str(node.args[0]))})",), (), ())
    if node.target in CONSTRUCTORS:
        return _named(node, _constructed(node, variables), value_type(node), variables)
    if not isinstance(node.target, OpOverload):
        raise EmitError(f"{node.name} calls {node.target!r}, which is not an op")
    try:
        assertion = node.target in ASSERTIONS
        call = assertion_text(node, variables) if assertion else call_text(node, node.target, variables)
    except EmitError as error:
        raise EmitError(f"{location(node)}: {overload_name(node.target)}: {error}") from None
    if assertion:
        return Statement((call + comment(node),), tuple(variables.reads), (), (Call(node, call, CHECK_HOLDS),))
    if is_host(node.target):
        if schema_of(node.target).returns and value_type(node) != "NoneType":
            return _named(node, call, value_type(node), variables)
        return Statement((call + comment(node),), tuple(variables.reads), ())
    results = [r.type.annotation_str for r in schema_of(node.target).returns]
    names = [variables.names.fresh(node.name if len(results) == 1 else f"{node.name}_{i}") for i in range(len(results))]
    variables.types.update(zip(names, results, strict=True))
    if results:
        variables.by_node[node] = names[0] if len(names) == 1 else tuple(names)
        call = f"{', '.join(names)} = {call}"
    expected = Call(node, call, overload_name(node.target), inside)
    return Statement((call + comment(node),), tuple(variables.reads), tuple(names), (expected,))


def _named(node: fx.Node, text: str, annotation: str, variables: Variables) -> Statement:
    """`name = text` for a value of the host."""
    name = variables.names.fresh(node.name)
    variables.name(node, name, annotation)
    return Statement((f"{name} = {text}",), tuple(variables.reads), (name,))


def _constructed(node: fx.Node, variables: Variables) -> str:
    """A list, tuple or dict."""
    annotation = value_type(node)
    if node.target is make_dict:
        keys, values = (list(a) for a in node.args)  # type: ignore[union-attr,arg-type]
        _, part = inner_types(annotation)
        pairs = (f"{variables.literal(k, 'str')}: {variables.literal(v, part)}" for k, v in zip(keys, values, strict=True))
        text = "{" + ", ".join(pairs) + "}"
    elif node.target is make_list:
        (part,) = inner_types(annotation)
        text = "[" + ", ".join(variables.literal(v, part) for v in node.args) + "]"
    else:
        parts = zip(node.args, inner_types(annotation), strict=True)
        text = "(" + "".join(f"{variables.literal(v, t)}, " for v, t in parts) + ")"
    return f"torch.jit.annotate({annotation}, {text})"


def _getitem(node: fx.Node, variables: Variables) -> Statement | None:
    container, index = node.args
    if not isinstance(container, fx.Node) or not isinstance(index, int):
        raise EmitError(f"{node.name}: getitem takes an op's results and a number, got {node.args}")
    results = variables.by_node.get(container)
    if isinstance(results, tuple):
        name = results[index]
        variables.name(node, name, variables.types[name])
        return None
    text = variables.read(container)
    type_ = variables.types[text]
    if not type_.startswith(("List[", "Tuple[")):
        raise EmitError(f"{node.name} reads an element of {container.name}, which is a {type_}")
    inner = inner_types(type_)
    name = variables.names.fresh(node.name)
    variables.name(node, name, inner[0] if type_.startswith("List[") else inner[index])
    return Statement((f"{name} = {text}[{index}]",), (text,), (name,))
