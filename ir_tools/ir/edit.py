"""Editing: a `Draft` of a Program, or of a region's body, to which nodes and constants are added.

A draft only adds, and redirects users to what it added. It never overwrites an argument of an existing op or the tensor behind
a name. What lost its last user is removed when the draft is finished.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import fx

from ir_tools.ir import alias_analysis, facts, shape_inference
from ir_tools.ir.dialect import bound_arguments, canonicalize_arguments, getitem, map_argument, short_name
from ir_tools.ir.effects import has_effect, written_arguments
from ir_tools.ir.facts import TensorFact, TupleFact
from ir_tools.ir.host import TENSOR, fail, set_value_type, value_type
from ir_tools.ir.joins import settle
from ir_tools.ir.prepack import copy_mark
from ir_tools.ir.program import Block, Program, body_of, public_name
from ir_tools.ir.provenance import CONSTANT, INPUT, UNKNOWN, Record, location, record, set_record
from ir_tools.ir.regions import Body, Outside, bodies, is_region, region_if, with_bodies
from ir_tools.ir.reinference import Stale
from ir_tools.torch_compat.fake import FakeTensor
from ir_tools.torch_compat.operators import OpOverload

B = TypeVar("B", bound=Block)


class Draft(Generic[B]):
    """A Program under construction. Use `Draft.of(program)` to edit a copy of a finished one.

    >>> draft = Draft.of(program)                     # doctest: +SKIP
    >>> with draft.before(node, "my_pass"):
    ...     new = draft.call(torch.ops.aten.relu.default, x)
    >>> draft.redirect(node, new)
    >>> program = draft.finish()                      # the very object given when nothing was edited
    """

    def __init__(self, program: B, original: B | None = None):
        self.program = program
        self.graph = program.graph
        self._original = original
        self._edited = original is None
        self._stale = Stale(program.mode)
        self._origin = UNKNOWN
        self._constant_nodes: dict[str, fx.Node] = {str(n.target): n for n in self.graph.find_nodes(op="get_attr")}
        self._head: fx.Node | None = None
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            self._head = node

    @classmethod
    def inside(cls, outer: Draft, name: str) -> Draft[Block]:
        """An empty draft of a body in what `outer` makes, over the same table; names of its nodes begin with `name`."""
        around = outer.program
        return Draft(Block(fx.Graph(), around.constants, around.mode, around.name + name))

    @classmethod
    def of(cls, program: B) -> Draft[B]:
        return cls(program.copy(), original=program)  # type: ignore[arg-type]

    def finish(self) -> B:
        """The edited Program without what became dead; the Program given to `of` when nothing was edited."""
        if not self._edited:
            assert self._original is not None
            return self._original
        self.sweep()
        self._stale.refresh_all(self.graph.nodes)
        if self._original is not None:
            settle(self.graph.nodes)
        return self.program

    def refresh(self, node: fx.Node) -> None:
        """Infer the fact of `node` again if an operand of it was replaced by one with another fact.

        A pass that goes through the graph in order, and asks for facts, calls this for each node; `finish` does it for all.
        """
        self._stale.refresh(node)

    @property
    def head(self) -> fx.Node:
        """The last placeholder or constant: what is inserted behind it may read all of them."""
        if self._head is None:
            raise ValueError("the Program has neither inputs nor constants")
        return self._head

    # -- adding -------------------------------------------------------------------------------------------------------

    @contextmanager
    def before(self, node: fx.Node, made_by: str = "") -> Iterator[None]:
        """Add nodes before `node`: made from it by the pass `made_by`, or, without one, in its place while it is captured."""
        previous = self._origin
        self._origin = record(node).derived(made_by) if made_by else record(node)
        try:
            with self.graph.inserting_before(node):
                yield
        finally:
            self._origin = previous

    @contextmanager
    def origin(self, value: Record) -> Iterator[None]:
        previous, self._origin = self._origin, value
        try:
            yield
        finally:
            self._origin = previous

    def placeholder(self, name: str, example: torch.Tensor) -> fx.Node:
        """A tensor input; its fact is taken from `example`, which may be fake (its data is not kept)."""
        node = self.graph.placeholder(name)
        facts.set_fact(node, self.program.mode.fact_of(example) if isinstance(example, FakeTensor) else TensorFact.of(example))
        set_record(node, Record(name=node.name, op=INPUT))
        self._head = node
        return node

    def constant(self, name: str, tensor: torch.Tensor, *, state: bool = False) -> fx.Node:
        """The `get_attr` node of a constant. Equal storage is entered once; a name already taken gets a number."""
        name = self.program.constants.enter(name, tensor.detach())
        if state:
            self.program.state |= {name}
        return self.get(name)

    def get(self, name: str) -> fx.Node:
        """The `get_attr` node of a constant that is in the table."""
        node = self._constant_nodes.get(name)
        if node is None:
            node = self._constant_nodes[name] = self._insert_at_head(name)
            facts.set_fact(node, TensorFact.of(self.program.constants[name]))
            made_by = self._origin.made_by if public_name(name) != name else ""
            set_record(node, Record(public_name(name), name=node.name, op=CONSTANT, made_by=made_by))
        return node

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> fx.Node:
        """A `call_function` node with canonical arguments, a fact, and the current origin.

        Raises `TypeError` for arguments that the schema does not take, `FactError` for shapes that the op rejects.
        """
        if isinstance(target, OpOverload):
            args, kwargs = canonicalize_arguments(target, args, kwargs)
        args = tuple(map_argument(a, self._as_argument) for a in args)
        kwargs = {k: map_argument(v, self._as_argument) for k, v in kwargs.items()}
        value = shape_inference.compute_fact(self.program.mode, target, args, kwargs)
        node = self.graph.create_node("call_function", target, args, kwargs, name=self._name_hint(target, args))
        facts.set_fact(node, value)
        for resized in _resized(node, value):
            facts.set_fact(resized, value)
        set_record(node, self._origin.at(node.name, short_name(target)))
        if target is getitem:
            set_value_type(node, _part_type(value_type(args[0])))
        return node

    def size(self, value: fx.Node, axis: int) -> Any:
        """One size of a tensor of known rank: the number where it is known now, else a node that reads it."""
        sizes = facts.shape(value)
        assert sizes is not None
        return sizes[axis] if isinstance(sizes[axis], int) else self.call(torch.ops.aten.size.int, value, axis)

    def again(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """The op of `node` on other operands; a region's results keep their facts, so its operands must have kept theirs."""
        if is_region(node):
            new = self.graph.create_node("call_function", node.target, tuple(args), kwargs)
            new.meta = dict(node.meta)
        else:
            new = self.call(node.target, *args, **kwargs)
            copy_mark(node, new)
            if "type" in node.meta:
                set_value_type(new, value_type(node))
        return new

    def operand(self, name: str, value: Any, annotation: str) -> fx.Node:
        """A placeholder of a body: a value with the fact `value` and a TorchScript type."""
        with self._at_head():
            node = self.graph.placeholder(self.program.name + name)
        facts.set_fact(node, value)
        set_value_type(node, annotation)
        set_record(node, Record(name=node.name, op=INPUT))
        self._head = node
        return node

    def region(self, target: Any, args: Sequence[Any], values: Sequence[Any], types: Sequence[str]) -> list[fx.Node]:
        """A region, and a node for each of its results, with their facts and types."""
        node = self.graph.create_node("call_function", target, tuple(args), name=self._name_hint(target, tuple(args)))
        facts.set_fact(node, TupleFact(tuple(values)))
        set_value_type(node, f"Tuple[{', '.join(types)}]")
        set_record(node, self._origin.at(node.name, short_name(target)))
        results = []
        for i, (value, annotation) in enumerate(zip(values, types, strict=True)):
            result = self.graph.create_node("call_function", getitem, (node, i), name=f"{node.name}_{i}")
            facts.set_fact(result, value)
            set_value_type(result, annotation)
            set_record(result, self._origin.at(result.name, short_name(getitem)))
            results.append(result)
        return results

    def require(self, condition: Any, message: str) -> None:
        """Raise `message` at run time unless `condition`, a runtime bool, holds."""
        sides = []
        for name in ("holds_", "fails_"):
            body = Draft.inside(self, f"require{len(self.graph.nodes)}_{name}")
            if name == "fails_":
                body.call(fail, message)
            body.output(())
            sides.append(body_of(body.program))
        self.region(region_if, [condition, *sides, []], [], [])

    def change_bodies(self, change: Callable[[Block], Block]) -> None:
        """Let `change` make another Block of each region's body, or return the one it is given."""
        memory = alias_analysis.Memory(self.graph, self.program.outside)
        for node in self.program.calls:
            if not is_region(node):
                continue
            old = bodies(node)
            new = [self._changed_body(body, change, alias_analysis.outside_of(node, memory)) for body in old]
            if any(a is not b for a, b in zip(old, new, strict=True)):
                with self.graph.inserting_before(node):
                    changed = self.again(node, with_bodies(node, new), {})
                    self.replace(node, changed)
                    self._stale.bodies_changed(changed)

    def _changed_body(self, body: Body, change: Callable[[Block], Block], outside: Outside) -> Body:
        before = self.program.of_body(body, outside)
        after = change(before)
        if after is before:
            return body
        self.program.constants.absorb(after.constants)
        return body_of(after, outside.carried)

    def insert_after(self, value: fx.Node, users: Sequence[fx.Node], made_by: str, target: Any, /, *args: Any) -> fx.Node:
        """`target(value, *args)` right behind `value` (behind all inputs and constants at least), read by `users`."""
        after = value if value.op == "call_function" else self.head
        with self.graph.inserting_after(after), self.origin(record(value).derived(made_by)):
            new = self.call(target, value, *args)
        for user in users:
            self.redirect_in(user, value, new)
        return new

    def output(self, values: Sequence[Any]) -> fx.Node:
        return self.graph.output(tuple(values))

    # -- redirecting --------------------------------------------------------------------------------------------------

    def redirect(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old`, other than `new` itself, read `new`."""
        self._stale.mark([user for user in old.users if user is not new], facts.fact(old), facts.fact(new))
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new, propagate_meta=False)
        self._edited = True

    def redirect_in(self, user: fx.Node, old: fx.Node, new: fx.Node) -> None:
        """Let one user read `new` in place of `old`."""
        self._stale.mark([user], facts.fact(old), facts.fact(new))
        user.replace_input_with(old, new)
        self._edited = True

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put `new`, the same op on other operands, in place of `old`, with its users and its name (site ids contain it)."""
        self.redirect(old, new)
        self.remove(old)
        new.name = old.name

    def remove(self, node: fx.Node) -> None:
        """Remove a node that nothing reads, effect or not."""
        self.graph.erase_node(node)
        self._edited = True

    def drop(self, nodes: Sequence[fx.Node]) -> None:
        """Remove those of `nodes` without users or effect, so that they are users no more; users come before their operands.

        That alone is not an edit: these nodes were dead, or just made.
        """
        for node in nodes:
            if not node.users and not has_effect(node):
                self.graph.erase_node(node)

    def sweep(self) -> list[tuple[str, str]]:
        """Remove nodes without users or effect, and constants that nothing reads.

        Returns (name, location) of the removed ops.
        """
        removed: list[tuple[str, str]] = []
        for node in reversed(list(self.graph.nodes)):
            if node.users or has_effect(node):
                continue
            if node.op == "get_attr":
                self._constant_nodes.pop(str(node.target), None)
            else:
                removed.append((node.name, location(node)))
            before: Any = node.prev  # fx closes the list of nodes with a "root"
            if self._head is node:
                self._head = None if before.op == "root" else before
            self.graph.erase_node(node)
            self._edited = True
        if isinstance(self.program, Program):  # a body shares its table with others
            self._forget_constants()
        return removed

    def _forget_constants(self) -> None:
        program = self.program
        for name in set(program.constants) - set(program.used_constants()):
            del program.constants[name]
        program.state &= set(program.constants)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _as_argument(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.constant("constant", leaf)
        return leaf


    def _insert_at_head(self, name: str) -> fx.Node:
        node_name = self.program.name + name.replace(".", "_").replace("@", "__")
        with self._at_head():
            node = self.graph.create_node("get_attr", name, name=node_name)
        self._head = node
        return node

    def _at_head(self) -> Any:
        """Insert behind the placeholders and constants that there are."""
        if self._head is not None:
            return self.graph.inserting_after(self._head)
        return self.graph.inserting_before(next(iter(self.graph.nodes), None))

    def _name_hint(self, target: Any, args: tuple) -> str:
        if target is getitem:
            return f"{args[0].name}_{args[1]}"
        return self.program.name + short_name(target)


def _resized(node: fx.Node, result: facts.Fact) -> list[fx.Node]:
    """The value of `out=` where the op gives it another shape, which it has from here on."""
    if not isinstance(result, TensorFact) or "out" not in written_arguments(node.target):
        return []
    out = bound_arguments(node)["out"]
    return [out] if isinstance(out, fx.Node) and facts.shape(out) != result.shape else []


def _part_type(container: str) -> str:
    """The type of an element of a list; that of a tuple's part is set by the caller."""
    return container[len("List[") : -1] if container.startswith("List[") else TENSOR
