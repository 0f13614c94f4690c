"""What forward returns, as the flat tensors that a Program gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ir_tools.frontends.errors import CaptureError
from ir_tools.ir import Draft
from ir_tools.ir.dialect import getitem
from ir_tools.ir.host import TENSOR, inner_types, set_value_type, value_type

aten = torch.ops.aten


def flat_values(draft: Draft, value: Any, tree: pytree.TreeSpec) -> list[Any]:
    """The tensors in a returned value of the structure `tree`, in pytree order.

    Refuses numbers that are known only at run time. A runtime list or dict is taken apart; one of another length than `tree`
    says makes the run raise.
    """
    children = tree.children() if not tree.is_leaf() else []
    if isinstance(value, fx.Node) and value_type(value) != TENSOR:
        parts = _runtime_parts(draft, value, tree)
        return [v for part, child in zip(parts, children, strict=True) for v in flat_values(draft, part, child)]
    if isinstance(value, (fx.Node, torch.Tensor)):
        return [value]
    if not isinstance(value, (dict, list, tuple)):
        return []
    if len(children) != len(value):
        # A model may answer otherwise once it is scripted: torchvision's GoogLeNet with a named tuple in place of a tensor.
        children = [tree if tree.is_leaf() else pytree.tree_structure(0)] * len(value)
        return [v for part, child in zip(_parts(value), children) for v in flat_values(draft, part, child)]
    known: Any = [value[key] for key in tree.context] if isinstance(value, dict) else value
    return [v for part, child in zip(known, children, strict=True) for v in flat_values(draft, part, child)]


def _parts(value: Any) -> Any:
    return list(value.values()) if isinstance(value, dict) else value


def _runtime_parts(draft: Draft, value: fx.Node, tree: pytree.TreeSpec) -> list[fx.Node]:
    """The elements of a runtime list, tuple or dict, made sure to be as many as `tree` has."""
    annotation, count = value_type(value), tree.num_children
    if tree.is_leaf() or not annotation.startswith(("List[", "Dict[", "Tuple[")):
        raise CaptureError(f"the model returns a {annotation} that depends on its inputs; return a tensor in its place")
    if annotation.startswith("Tuple["):
        parts = [draft.call(getitem, value, i) for i in range(count)]
        types = inner_types(annotation)
    else:
        of_dict = annotation.startswith("Dict[")
        length = draft.call(aten.len.Dict_str if of_dict else aten.len.t, value)
        draft.require(
            draft.call(aten.eq.int, length, count),
            f"the model returned a {annotation} of another length than {count}, that of the example",
        )
        keys = tree.context if of_dict else range(count)
        read = aten.__getitem__.Dict_str if of_dict else aten.__getitem__.t
        parts = [draft.call(read, value, key) for key in keys]
        types = [inner_types(annotation)[-1]] * count
    for part, of in zip(parts, types, strict=True):
        set_value_type(part, of)
    return parts
