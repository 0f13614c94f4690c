"""The contract of the IR, checked: every front end and every pass must leave a Program that passes this."""

from __future__ import annotations

import torch
from torch import fx

from ir_tools.ir import facts
from ir_tools.ir.dialect import argument_names, getitem, op_name
from ir_tools.ir.host import CONSTRUCTORS, fail
from ir_tools.ir.program import Program
from ir_tools.ir.regions import bodies, inputs_of, is_region, region_loop
from ir_tools.torch_compat.operators import OpOverload


class IllFormedError(AssertionError):
    """A Program breaks the contract; the message lists every breach."""


def check_wellformed(program: Program) -> None:
    """Raise `IllFormedError` listing what breaks the contract; return None when nothing does."""
    names: set[str] = set()
    problems = _graph_problems(program, program.graph, names)
    outputs = program.graph.find_nodes(op="output")
    if outputs and isinstance(outputs[0].args[0], tuple) and len(outputs[0].args[0]) != program.signature.output_count:
        problems.append(
            f"the output holds {len(outputs[0].args[0])} values, the signature {program.signature.output_count}"
        )
    if len(program.placeholders) != len(program.signature.inputs):
        problems.append(f"{len(program.placeholders)} placeholders for {len(program.signature.inputs)} inputs")
    for name, tensor in program.constants.items():
        if isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad:
            problems.append(f"constant {name} must be a detached alias, not a Parameter or a tensor with gradient")
    for name in program.state:
        if name not in program.constants:
            problems.append(f"{name} is not in the table of constants")
    if problems:
        raise IllFormedError("the Program is ill-formed:\n  " + "\n  ".join(problems))


def _graph_problems(program: Program, graph: fx.Graph, names: set[str]) -> list[str]:
    """The problems of a graph and of the bodies in it; `names` are those of nodes seen so far."""
    problems: list[str] = []
    seen: set[fx.Node] = set()
    nodes = list(graph.nodes)
    for node in nodes:
        for n in node.all_input_nodes:
            if n not in seen:
                problems.append(f"{node.name} reads {n.name} before it is computed")
        if node.op != "output" and node.name in names:
            problems.append(f"two nodes are called {node.name}")
        names.add(node.name)
        seen.add(node)
        problems.extend(_node_problems(program, node))
        if is_region(node):
            problems.extend(_region_problems(node))
            for body in bodies(node):
                problems.extend(_graph_problems(program, body.graph, names))
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        problems.append("there must be one output node, and it must be last")
    elif not isinstance(outputs[0].args[0], tuple):
        problems.append("the output must hold a flat tuple")
    return problems


def _region_problems(node: fx.Node) -> list[str]:
    """Bodies take as many inputs as the region passes, and return as many results as it has."""
    given = len(inputs_of(node))
    wanted = len(facts.fact(node)) + (node.target is region_loop)
    problems = []
    for body in bodies(node):
        if len(body.placeholders) != given:
            problems.append(f"{node.name} gives {given} values to a body that takes {len(body.placeholders)}")
        if len(body.results) != wanted:
            problems.append(f"a body of {node.name} gives {len(body.results)} results instead of {wanted}")
    return problems


def _node_problems(program: Program, node: fx.Node) -> list[str]:
    if node.op in ("placeholder", "output"):
        return []
    if node.op == "get_attr":
        if node.target not in program.constants:
            return [f"{node.name} reads the constant {node.target!r}, which is not in the table"]
        return []
    if node.op != "call_function":
        return [f"{node.name} is a {node.op} node; the dialect has placeholder, get_attr, call_function, output"]
    if node.target is getitem or node.target in CONSTRUCTORS or node.target is fail or is_region(node):
        return []
    if not isinstance(node.target, OpOverload):
        return [f"{node.name} calls {node.target!r}, which is not an OpOverload"]
    positional, keyword_only = argument_names(node.target)
    if len(node.args) != len(positional) or set(node.kwargs) != set(keyword_only):
        return [f"{node.name}: the arguments of {op_name(node.target)} are not in canonical form"]
    return []
