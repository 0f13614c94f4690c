"""How an emitted module is called: which of the user's containers TorchScript can type, and what becomes of others.

- A tensor is a `Tensor`; a tuple a `Tuple[...]`; a list whose elements have one type a `List[...]`; a dict with string
  keys whose values have one type a `Dict[str, ...]`; nested as they come.
- An argument without any tensor was baked in at capture and is left out.
- An argument that cannot be typed (it mixes tensors with None or numbers, is a named tuple ...) becomes one flat
  argument for each of its tensors, named after its path: `batch['mask']` becomes `batch_mask`.
- Outputs that cannot be typed become a flat tuple of the tensors (None when there are none).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ir_tools.ir.signature import Signature, leaf_names
from ir_tools.torch_compat import pytree


@dataclass(frozen=True)
class Structure:
    """A tensor (`kind` "tensor", number `index` of the flat tensors) or a typed container of Structures."""

    kind: str
    index: int = -1
    keys: tuple[str, ...] = ()
    parts: tuple[Structure, ...] = ()

    @property
    def annotation(self) -> str:
        if self.kind == "tensor":
            return "Tensor"
        if self.kind == "tuple":
            return f"Tuple[{', '.join(p.annotation for p in self.parts)}]"
        if self.kind == "list":
            return f"List[{self.parts[0].annotation}]"
        return f"Dict[str, {self.parts[0].annotation}]"

    def build(self, tensors: Sequence[Any]) -> Any:
        """The container around the flat tensors."""
        if self.kind == "tensor":
            return tensors[self.index]
        parts = [p.build(tensors) for p in self.parts]
        if self.kind == "dict":
            return dict(zip(self.keys, parts, strict=True))
        return tuple(parts) if self.kind == "tuple" else parts

    def leaves(self, value: Any) -> Iterator[tuple[int, Any]]:
        """(index, tensor) of every tensor in a container of this structure."""
        if self.kind == "tensor":
            yield self.index, value
        else:
            parts = [value[key] for key in self.keys] if self.kind == "dict" else value
            for structure, part in zip(self.parts, parts, strict=True):
                yield from structure.leaves(part)


@dataclass(frozen=True)
class Argument:
    """One argument of the emitted `forward`. `path` locates it in the user's call."""

    name: str
    path: str
    structure: Structure


def typed_structure(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Structure | None:
    """The Structure of a tree whose leaves are indices of tensors, None when TorchScript cannot type it."""
    if spec.is_leaf():
        return Structure("tensor", index=leaves[0]) if isinstance(leaves[0], int) else None
    kind = {tuple: "tuple", list: "list", dict: "dict"}.get(spec.type)
    if kind is None or spec.num_children == 0:
        return None
    parts = []
    for child, own in _children(spec, leaves):
        part = typed_structure(child, own)
        if part is None:
            return None
        parts.append(part)
    if kind != "tuple" and len({p.annotation for p in parts}) > 1:
        return None
    keys = tuple(spec.context) if kind == "dict" else ()
    if not all(isinstance(key, str) for key in keys):
        return None
    return Structure(kind, keys=keys, parts=tuple(parts))


def emitted_arguments(signature: Signature) -> list[Argument]:
    """The arguments of the emitted `forward`, in order; names are not yet made legal identifiers."""
    arguments: list[Argument] = []
    paths = leaf_names(signature.in_tree)
    at = 0
    for name, (spec, leaves) in zip(
        signature.in_tree.context, _children(signature.in_tree, signature.in_leaves), strict=True
    ):
        own_paths = paths[at : at + spec.num_leaves]
        at += spec.num_leaves
        structure = typed_structure(spec, leaves)
        if structure is not None:
            arguments.append(Argument(str(name), str(name), structure))
            continue
        for path, leaf in zip(own_paths, leaves, strict=True):
            if isinstance(leaf, int):
                arguments.append(Argument(path, path, Structure("tensor", index=leaf)))
    return arguments


def arguments_for(signature: Signature, tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Positional arguments for the emitted module from the flat tensors of `signature.flatten`."""
    return [argument.structure.build(tensors) for argument in emitted_arguments(signature)]


def output_structure(signature: Signature) -> Structure | None:
    return typed_structure(signature.out_tree, signature.out_leaves)


def typed_outputs(signature: Signature) -> bool:
    """The emitted module returns the user's own structure (else a flat tuple of tensors, or None without any)."""
    return output_structure(signature) is not None


def flat_outputs(signature: Signature, result: Any) -> list[torch.Tensor]:
    """The flat tensors, as `signature.unflatten_outputs` takes them, of what the emitted module returned."""
    if result is None:
        return []
    structure = output_structure(signature)
    if structure is None:
        return list(result)
    return [tensor for _, tensor in sorted(structure.leaves(result), key=lambda pair: pair[0])]


def _children(spec: pytree.TreeSpec, leaves: Sequence[Any]) -> Iterator[tuple[pytree.TreeSpec, Sequence[Any]]]:
    at = 0
    for child in spec.children():
        yield child, leaves[at : at + child.num_leaves]
        at += child.num_leaves
