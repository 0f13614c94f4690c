"""Pytrees: nested containers as a flat list of leaves and a spec. The names are those of the field (jax has the same)."""

from __future__ import annotations

from torch.utils import _pytree

TreeSpec = _pytree.TreeSpec
"""The structure of nested containers."""

SequenceKey = _pytree.SequenceKey
"""The step of a path that goes to an entry of a list or tuple."""

keystr = _pytree.keystr
"""A path as Python writes it: `['x'][0]`."""

register_pytree_node = _pytree.register_pytree_node
"""Makes a class a container."""

REGISTRATION = "torch.utils._pytree.register_pytree_node"
"""The same as users write it: torch has no public name for it."""

tree_flatten = _pytree.tree_flatten
"""The leaves and the spec."""

tree_flatten_with_path = _pytree.tree_flatten_with_path
"""The leaves with their paths, and the spec."""

tree_leaves = _pytree.tree_leaves
"""The leaves."""

tree_map = _pytree.tree_map
"""The same containers with a function of each leaf."""

tree_map_only = _pytree.tree_map_only
"""The same containers with a function of each leaf of one type; other leaves stay."""

tree_structure = _pytree.tree_structure
"""The spec."""

tree_unflatten = _pytree.tree_unflatten
"""The containers again, from leaves and a spec."""

treespec_dumps = _pytree.treespec_dumps
"""A spec as text."""

treespec_loads = _pytree.treespec_loads
"""The spec that a text says."""
