"""Prepacking: ops that prepare constants for a kernel. They run once, when a file is loaded, and not in every call.

    prepack_conv(w, padding, stride, dilation, groups, input_size)   w laid out for oneDNN's convolutions
    prepack_linear(w, batch)                                         w laid out for oneDNN's linears

A prepack op is an op like any other in a Program: it runs where it stands, and its fact says what it gives. Emission hoists it
out of the graph where its tensor operands are constants, or made by such prepack ops. No pass folds it: what it gives may be
opaque, and cannot be saved.

The two ops here are always prepack ops. Of any other op a node is one if it is marked; the same op of a model stays ordinary.

The two ops here give opaque tensors. Their facts are those of the plain weight: `to_dense` gives it back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ir_tools.errors import OptionError
from ir_tools.ir.dialect import map_argument
from ir_tools.ir.provenance import record
from ir_tools.torch_compat.operators import OpOverload, schema_of

library = torch.library.Library("torch_passes", "FRAGMENT")
library.define(
    "prepack_conv(Tensor w, int[] padding, int[] stride, int[] dilation, int groups, int[]? input_size) -> Tensor"
)
library.define("prepack_linear(Tensor w, int? batch) -> Tensor")


def _plain_fact(w: torch.Tensor, *hints: object) -> torch.Tensor:
    return torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=w.device)


def _packed_for_conv(w, padding, stride, dilation, groups, input_size):
    return torch.ops.mkldnn._reorder_convolution_weight(w, padding, stride, dilation, groups, input_size)


def _packed_for_linear(w, batch):
    return torch.ops.mkldnn._reorder_linear_weight(w, batch)


library.impl("prepack_conv", _packed_for_conv, "CPU")
library.impl("prepack_linear", _packed_for_linear, "CPU")
library.impl("prepack_conv", _plain_fact, "Meta")
library.impl("prepack_linear", _plain_fact, "Meta")

prepack_conv: OpOverload = torch.ops.torch_passes.prepack_conv.default
prepack_linear: OpOverload = torch.ops.torch_passes.prepack_linear.default


@dataclass(frozen=True)
class Prepack:
    """What a file calls in place of a prepack op, and whether `to_dense` of the result is the first operand bit for bit.

    Where it is not, a file keeps the plain constants beside what is made from them.
    """

    kernel: OpOverload
    is_undone_by_to_dense: bool = False


_known: dict[OpOverload, Prepack] = {}
_MARK = "prepack"


def check_prepack(op: OpOverload) -> None:
    """Raise `OptionError` for an op that writes into its operands, may give one of them back, or gives no single tensor."""
    schema = schema_of(op)
    returns = [str(r.type) for r in schema.returns]
    if schema.is_mutable or returns != ["Tensor"] or any(r.alias_info is not None for r in schema.returns):
        raise OptionError(f"a prepack op is pure and gives one new tensor; the schema is {schema}")


def mark_prepacks(nodes: Iterable[fx.Node], ops: Collection[OpOverload]) -> fx.Node | None:
    """Mark those of `nodes` that call one of `ops`. Returns the first that is given a runtime value: it is none."""
    for node in nodes:
        if node.target in ops:
            node.meta[_MARK] = True
            if not is_prepack(node):
                return node
    return None


def has_mark(node: fx.Node) -> bool:
    return _MARK in node.meta


def copy_mark(node: fx.Node, to: fx.Node) -> None:
    """Let `to`, the op of `node` on other operands, be a prepack op if `node` is one."""
    if _MARK in node.meta:
        to.meta[_MARK] = True


def prepack_of(node: fx.Node) -> Prepack | None:
    """What is known of a node that calls a prepack op; None for any other node."""
    if node.op != "call_function":
        return None
    target: Any = node.target
    known = _known.get(target)
    return Prepack(target) if known is None and _MARK in node.meta else known


def is_prepack(node: fx.Node) -> bool:
    """The node calls a prepack op on constants, or on what such nodes give, so that emission hoists it."""
    return prepack_of(node) is not None and all(n.op == "get_attr" or is_prepack(n) for n in node.all_input_nodes)


def constants_of(node: fx.Node) -> list[fx.Node]:
    """The constants that a hoisted node is made from, in order, also through other prepack ops."""
    parts = [[n] if n.op == "get_attr" else constants_of(n) for n in node.all_input_nodes]
    return list(dict.fromkeys(constant for part in parts for constant in part))


def take_prepacks_out(graph: fx.Graph, load: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace the prepack ops of a graph by constants, equal ones by one, and return these by name.

    `load` gives the plain constants; those that nothing else reads are taken out.
    """
    made: dict[str, torch.Tensor] = {}
    known: dict[str, fx.Node] = {}
    plain: list[fx.Node] = []
    head = next((n for n in reversed(graph.nodes) if n.op == "get_attr"), None)
    for node in [n for n in graph.nodes if is_prepack(n)]:
        key = str((node.target, node.args, node.kwargs))
        plain += node.all_input_nodes
        if key not in known:
            name = base = f"{str(plain[-1].target).partition('@')[0]}@{('prepacked', *record(node).passes)[-1]}"
            while name in made:
                name = f"{base}_{len(made)}"
            made[name] = _evaluated(node, lambda name: made[name] if name in made else load(name))
            with graph.inserting_after(head):
                head = known[key] = graph.create_node("get_attr", name, name=name.replace(".", "_").replace("@", "__"))
        node.replace_all_uses_with(known[key])
        graph.erase_node(node)
    for constant in dict.fromkeys(plain):
        if not constant.users:
            graph.erase_node(constant)
    return made


def _evaluated(node: fx.Node, load: Callable[[str], torch.Tensor]) -> torch.Tensor:
    def look_up(leaf: Any) -> Any:
        return load(str(leaf.target)) if isinstance(leaf, fx.Node) else leaf

    args, kwargs = map_argument(node.args, look_up), {k: map_argument(v, look_up) for k, v in node.kwargs.items()}
    result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _make_known() -> None:
    """A torch without oneDNN has no such kernels, and makes no Program that needs them."""
    if torch.backends.mkldnn.is_available():
        kernels = torch.ops.mkldnn._reorder_convolution_weight, torch.ops.mkldnn._reorder_linear_weight
        for op, kernel in zip((prepack_conv, prepack_linear), kernels, strict=True):
            _known[op] = Prepack(kernel.default, is_undone_by_to_dense=True)


_make_known()
