"""The contract of the IR, checked: every front end and every pass must leave a Program that passes this."""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload

from ir_tools.ir.dialect import argument_names, getitem, op_name
from ir_tools.ir.program import Program


class IllFormedError(AssertionError):
    """A Program breaks the contract; the message lists every breach."""


def check_wellformed(program: Program) -> None:
    """Raise `IllFormedError` listing what breaks the contract; return None when nothing does."""
    problems: list[str] = []
    seen: set[fx.Node] = set()
    names: set[str] = set()
    nodes = program.nodes
    for node in nodes:
        for n in node.all_input_nodes:
            if n not in seen:
                problems.append(f"{node.name} reads {n.name} before it is computed")
        if node.name in names:
            problems.append(f"two nodes are called {node.name}")
        names.add(node.name)
        seen.add(node)
        problems.extend(_node_problems(program, node))
    outputs = [n for n in nodes if n.op == "output"]
    if len(outputs) != 1 or nodes[-1] is not outputs[0]:
        problems.append("there must be one output node, and it must be last")
    elif not isinstance(outputs[0].args[0], tuple):
        problems.append("the output must hold a flat tuple")
    elif len(outputs[0].args[0]) != program.signature.output_count:
        problems.append(
            f"the output holds {len(outputs[0].args[0])} values, the signature {program.signature.output_count}"
        )
    if len(program.placeholders) != len(program.signature.inputs):
        problems.append(f"{len(program.placeholders)} placeholders for {len(program.signature.inputs)} inputs")
    for name, tensor in program.constants.items():
        if isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad:
            problems.append(f"constant {name} must be a detached alias, not a Parameter or a tensor with gradient")
    for name in (*program.state, *program.packings):
        if name not in program.constants:
            problems.append(f"{name} is not in the table of constants")
    if problems:
        raise IllFormedError("the Program is ill-formed:\n  " + "\n  ".join(problems))


def _node_problems(program: Program, node: fx.Node) -> list[str]:
    if node.op in ("placeholder", "output"):
        return []
    if node.op == "get_attr":
        if node.target not in program.constants:
            return [f"{node.name} reads the constant {node.target!r}, which is not in the table"]
        return []
    if node.op != "call_function":
        return [f"{node.name} is a {node.op} node; the dialect has placeholder, get_attr, call_function, output"]
    if node.target is getitem:
        return []
    if not isinstance(node.target, OpOverload):
        return [f"{node.name} calls {node.target!r}, which is not an OpOverload"]
    positional, keyword_only = argument_names(node.target)
    if len(node.args) != len(positional) or set(node.kwargs) != set(keyword_only):
        return [f"{node.name}: the arguments of {op_name(node.target)} are not spelled out in full"]
    return []
