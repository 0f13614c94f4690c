"""Editing: a `Draft` of a Program to which nodes and constants are added and in which readers are redirected.

A draft only adds and redirects, it never overwrites an argument of an existing op or the tensor behind a name. What lost its
last reader is swept when the draft is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from ir_tools.ir import facts
from ir_tools.ir.dialect import getitem, has_effect, map_argument, short_name, spell_arguments
from ir_tools.ir.origin import Origin, origin, place, set_origin
from ir_tools.ir.program import Packing, Program, public_name


class Draft:
    """A Program under construction. Use `Draft.of(program)` to edit a copy of a finished one.

    >>> draft = Draft.of(program)                     # doctest: +SKIP
    >>> with draft.before(node, "my_pass"):
    ...     new = draft.call(torch.ops.aten.relu.default, x)
    >>> draft.redirect(node, new)
    >>> program = draft.finish()                      # the very object given when nothing was edited
    """

    def __init__(self, program: Program, original: Program | None = None):
        self.program = program
        self.graph = program.graph
        self._original = original
        self._edited = original is None
        self._origin = Origin()
        self._constant_nodes: dict[str, fx.Node] = {str(n.target): n for n in self.graph.find_nodes(op="get_attr")}
        self._by_identity: dict[tuple, str] = {
            (_identity(t), program.packings.get(name)): name for name, t in program.constants.items()
        }
        self._head: fx.Node | None = None
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            self._head = node

    @classmethod
    def of(cls, program: Program) -> Draft:
        return cls(program.copy(), original=program)

    def finish(self) -> Program:
        """The edited Program without what became dead; the Program given to `of` when nothing was edited."""
        if not self._edited:
            assert self._original is not None
            return self._original
        self.sweep()
        return self.program

    @property
    def head(self) -> fx.Node:
        """The last placeholder or constant: what is inserted behind it may read all of them."""
        if self._head is None:
            raise ValueError("the Program has neither inputs nor constants")
        return self._head

    # -- adding -------------------------------------------------------------------------------------------------------

    @contextmanager
    def before(self, node: fx.Node, made_by: str = "") -> Iterator[None]:
        """Add nodes before `node`, with its origin, marked as made by `made_by`."""
        previous = self._origin
        self._origin = origin(node).made_by(made_by) if made_by else origin(node)
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._origin = previous

    @contextmanager
    def origin(self, value: Origin) -> Iterator[None]:
        previous, self._origin = self._origin, value
        try:
            yield
        finally:
            self._origin = previous

    def placeholder(self, name: str, example: torch.Tensor) -> fx.Node:
        """A tensor input; its fact is taken from `example` (shape, dtype, device), whose data is not kept."""
        node = self.graph.placeholder(name)
        facts.set_fact(node, self._fake(example))
        self._head = node
        return node

    def constant(self, name: str, tensor: torch.Tensor, *, state: bool = False, packing: Packing | None = None) -> fx.Node:
        """The `get_attr` node of a constant. Equal storage is entered once; a name already taken gets a number."""
        tensor = tensor.detach()
        identity = (_identity(tensor), packing)
        known = self._by_identity.get(identity)
        if known is not None:
            name = known
        else:
            name = self._free_name(name)
            self.program.constants[name] = tensor
            self._by_identity[identity] = name
            if packing is not None:
                self.program.packings[name] = packing
        if state:
            self.program.state |= {name}
        node = self._constant_nodes.get(name)
        if node is None:
            node = self._insert_at_head(name)
            facts.set_fact(node, self._fake(tensor))
            set_origin(node, Origin(module=public_name(name), rules=self._origin.rules))
            self._constant_nodes[name] = node
        return node

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A `call_function` node with spelled-out arguments, a fact, and the current origin.

        Raises `TypeError` for arguments that the schema does not take, `FactError` for shapes that the op rejects.
        """
        if isinstance(target, OpOverload):
            args, kwargs = spell_arguments(target, args, kwargs)
        args = tuple(map_argument(a, self._as_argument) for a in args)
        kwargs = {k: map_argument(v, self._as_argument) for k, v in kwargs.items()}
        value = facts.compute_fact(self.program.mode, target, args, kwargs)
        node = self.graph.create_node("call_function", target, args, kwargs, name=self._name_hint(target, args))
        facts.set_fact(node, value)
        set_origin(node, self._origin)
        return node

    def insert_after(self, value: fx.Node, readers: Sequence[fx.Node], made_by: str, target: Any, /, *args: Any) -> fx.Node:
        """`target(value, *args)` right behind `value` (behind all inputs and constants at least), read by `readers`."""
        after = value if value.op == "call_function" else self.head
        with self.graph.inserting_after(after), self.origin(origin(value).made_by(made_by)):
            new = self.call(target, value, *args)
        for reader in readers:
            self.redirect_in(reader, value, new)
        return new

    def output(self, values: Sequence[Any]) -> fx.Node:
        return self.graph.output(tuple(values))

    # -- redirecting --------------------------------------------------------------------------------------------------

    def redirect(self, old: fx.Node, new: fx.Node) -> None:
        """Let every reader of `old`, other than `new` itself, read `new`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda reader: reader is not new, propagate_meta=False)
        self._edited = True

    def redirect_in(self, reader: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one reader read `new` in place of `old`."""
        reader.replace_input_with(old, new)
        self._edited = True

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put `new`, the same op on other operands, in the place of `old`: its readers and its name (site ids hang on it)."""
        self.redirect(old, new)
        self.remove(old)
        new.name = old.name

    def remove(self, node: fx.Node) -> None:
        """Remove a node that nothing reads, effect or not."""
        self.graph.erase_node(node)
        self._edited = True

    def drop(self, nodes: Sequence[fx.Node]) -> None:
        """Remove those of `nodes`, readers before what they read, that nobody needs: they are no readers any more."""
        for node in nodes:
            if not node.users and not has_effect(node):
                self.remove(node)

    def sweep(self) -> list[tuple[str, str]]:
        """Remove nodes without readers or effect, and constants that nothing reads.

        Returns (name, place) of the ops that went.
        """
        removed: list[tuple[str, str]] = []
        for node in reversed(list(self.graph.nodes)):
            if node.users or has_effect(node):
                continue
            if node.op == "get_attr":
                self._constant_nodes.pop(str(node.target), None)
            else:
                removed.append((node.name, place(node)))
            before: Any = node.prev  # fx closes the list of nodes with a "root"
            if self._head is node:
                self._head = None if before.op == "root" else before
            self.graph.erase_node(node)
            self._edited = True
        program = self.program
        for name in set(program.constants) - set(self._constant_nodes):
            del program.constants[name]
            program.packings.pop(name, None)
        program.state &= set(program.constants)
        return removed

    # -- inside -------------------------------------------------------------------------------------------------------

    def _as_argument(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.constant("constant", leaf)
        return leaf

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.program.mode.from_tensor(tensor.detach(), static_shapes=True)

    def _free_name(self, name: str) -> str:
        candidate, count = name, 1
        while candidate in self.program.constants:
            count += 1
            candidate = f"{name}_{count}" if "@" in name else f"{name}@{count}"
        return candidate

    def _insert_at_head(self, name: str) -> fx.Node:
        anchor = self._head
        node_name = name.replace(".", "_").replace("@", "__")
        if anchor is None:
            first = next(iter(self.graph.nodes), None)
            place = self.graph.inserting_before(first) if first is not None else self.graph.inserting_before(None)
        else:
            place = self.graph.inserting_after(anchor)
        with place:
            node = self.graph.create_node("get_attr", name, name=node_name)
        self._head = node
        return node

    def _name_hint(self, target: Any, args: tuple) -> str:
        if target is getitem:
            return f"{args[0].name}_{args[1]}"
        return short_name(target)


def _identity(tensor: torch.Tensor) -> tuple:
    """Equal for two tensors that are the same view of the same storage."""
    if tensor.is_mkldnn or tensor.layout is not torch.strided or tensor.numel() == 0:
        return (id(tensor),)
    view = (tensor.data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    return (*view, tensor.is_conj(), tensor.is_neg())
