"""Facts about values: shape and dtype (as fake tensors), and which values share storage.

Facts are three-valued: a question about a value without a fact is answered None, "unknown", and a rule that needs the
answer refuses.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from networkx.utils import UnionFind
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode, UnsupportedOperatorException

from ir_tools.errors import PassesError
from ir_tools.ir.dialect import aliased_nodes, has_effect, map_argument, nodes_in, overload_name, written_nodes


class FactError(PassesError, RuntimeError):
    """An op rejects the shapes or dtypes of its arguments."""


def fact(value: Any) -> Any:
    """The fake tensor (or tuple/list of them) of a node, None when unknown; anything else stands for itself."""
    return value.meta.get("val") if isinstance(value, fx.Node) else value


def set_fact(node: fx.Node, value: Any) -> None:
    node.meta["val"] = value


def shape(value: Any) -> tuple[int, ...] | None:
    known = fact(value)
    return tuple(known.shape) if isinstance(known, torch.Tensor) else None


def rank(value: Any) -> int | None:
    known = fact(value)
    return known.dim() if isinstance(known, torch.Tensor) else None


def dtype(value: Any) -> torch.dtype | None:
    known = fact(value)
    return known.dtype if isinstance(known, torch.Tensor) else None


def device(value: Any) -> torch.device | None:
    known = fact(value)
    return known.device if isinstance(known, torch.Tensor) else None


# Ops without a fake kernel in torch: the position of the argument that has the shape and dtype of the result.
SAME_FACT_AS = {
    "mkldnn::_convolution_pointwise.binary": 1,
    "mkldnn::_convolution_pointwise_.binary": 0,
    "mkldnn::_linear_pointwise.binary": 1,
}


def compute_fact(mode: FakeTensorMode, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What `target` gives on the facts of its arguments; None when one of them is unknown.

    Raises `FactError` when the op itself rejects them.
    """
    unknown = False

    def known(value: Any) -> Any:
        nonlocal unknown
        out = fact(value)
        unknown = unknown or (isinstance(value, fx.Node) and out is None)
        return out

    fake_args = tuple(map_argument(a, known) for a in args)
    fake_kwargs = {k: map_argument(v, known) for k, v in kwargs.items()}
    if unknown:
        return None
    try:
        with torch.no_grad(), mode:
            if torch.Tag.inplace_view in getattr(target, "tags", ()):
                # It changes the shape of the very tensor: give it another one over the same storage.
                fake_args = (torch.ops.aten.alias.default(fake_args[0]), *fake_args[1:])
            return target(*fake_args, **fake_kwargs)
    except UnsupportedOperatorException as error:
        like = SAME_FACT_AS.get(overload_name(target))
        if like is None:
            raise FactError(f"{overload_name(target)} has no fake kernel, so its result's shape cannot be known") from error
        return fake_args[like]
    except Exception as error:
        shapes = ", ".join(_describe(a) for a in fake_args)
        raise FactError(f"{overload_name(target)}({shapes}) fails: {str(error).splitlines()[0]}") from error


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


def storage_classes(nodes: Iterable[fx.Node]) -> UnionFind:
    """Values grouped by "may share storage"."""
    classes = UnionFind()
    for node in nodes:
        classes[node]
        for other in aliased_nodes(node):
            classes.union(node, other)
    return classes


def mutated_values(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every value whose storage some node of the graph may write into: passes leave these alone."""
    writers = [n for n in graph.nodes if n.op == "call_function" and written_nodes(n)]
    if not writers:
        return frozenset()
    classes = storage_classes(graph.nodes)
    roots = {classes[target] for writer in writers for target in written_nodes(writer)}
    return frozenset(n for n in graph.nodes if classes[n] in roots)


def dies_at(node: fx.Node, reader: fx.Node) -> bool:
    """`reader` reads `node` once and last, and no other value that is read from here on shares its memory."""
    if sum(n is node for n in nodes_in([*reader.args, *reader.kwargs.values()])) != 1:
        return False
    last = reader
    while node.op == "call_function":
        if any(user is not last and (user > last or node in aliased_nodes(user)) for user in node.users):
            return False
        sources = aliased_nodes(node)
        if not sources:
            return True
        if len(sources) > 1:
            return False
        # The memory is that of an earlier value (written in place, or viewed): that one must be dead by now too.
        last, node = node, sources[0]
    return False


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the outputs, or an effect, need."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in live or has_effect(node):
            live.add(node)
            live.update(node.all_input_nodes)
    return live
