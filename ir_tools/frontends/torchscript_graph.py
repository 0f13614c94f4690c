"""A walk over a TorchScript graph, traced or scripted: everything known now is computed, the rest becomes nodes.

The walk interprets the graph in order. A TorchScript value is one of: a Python value known now (numbers, strings, lists,
dicts, small tensors made of numbers), an fx node (a tensor, number or container of the run), or a `ModuleValue`. Where sizes
are known from the example inputs, loops over them unroll and Ifs on them are resolved. An If or Loop on a value of the run
becomes a region: its blocks are walked in `_Frame`s of their own, whose drafts become the region's bodies, and what they
read from outside becomes an operand.

A list is kept as a Python list as long as its length is known. One that a region changes has to become a node first:
`NeedsNode` unwinds to the frame where the list was made, which makes the node and walks the region again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import fx

from ir_tools.errors import first_line
from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.fx_graph import source_line
from ir_tools.frontends.normalize import Normalizer, purify
from ir_tools.frontends.torchscript_ops import HANDLERS, TAKES_TEXT, part_of
from ir_tools.frontends.torchscript_values import (
    ARGUMENT,
    ATTRIBUTE,
    NUMBER_OF_DTYPE,
    UNINITIALIZED,
    Container,
    ModuleValue,
    NeedsNode,
    ObjectValue,
    Raised,
    TextOfData,
    Uninitialized,
    constant_value,
    count_nodes,
    from_leaves,
    holds,
    is_small,
    is_tensor_type,
    leaf_types,
    makes_a_tensor,
    overload_of,
    type_leaves,
    where,
)
from ir_tools.ir import Draft, Origin, facts
from ir_tools.ir.dialect import getitem, spell_arguments, written_arguments
from ir_tools.ir.host import fail, inner_types, is_host, make_dict, make_list, make_tuple, set_value_type, value_type
from ir_tools.ir.program import body_of
from ir_tools.ir.regions import Body, region_if, region_loop
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.jit import wraps_script_object
from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten
LARGEST_UNROLLED = 20_000
"""Nodes of TorchScript that unrolling a loop may give; a longer one stays a loop."""
MOST_ATTEMPTS = 16
"""At finding what holds for the values of a loop in every round; each one knows less than the one before."""
NO_LIMIT = 1 << 62
"""From this trip count on a loop has no limit but its condition."""


@dataclass
class _Frame:
    """A graph under construction: the root's, or that of a region's body, with what it reads from outside."""

    draft: Draft
    normalizer: Normalizer
    operands: dict[fx.Node, fx.Node] = field(default_factory=dict)  # outer node -> placeholder here

    @classmethod
    def over(cls, draft: Draft) -> _Frame:
        return cls(draft, Normalizer(draft))

    def operand(self, outer: fx.Node) -> fx.Node:
        """The value of the next outer graph as one of this body."""
        if outer.op == "get_attr":
            return self.draft.get(str(outer.target))
        if outer not in self.operands:
            self.operands[outer] = self.draft.operand(outer.name, facts.fact(outer), value_type(outer))
        return self.operands[outer]


class GraphWalk:
    """Walks one ScriptModule's `forward`, adding nodes to a draft. `prefix` is cut from module paths."""

    def __init__(self, draft: Draft, prefix: str = ""):
        self.prefix = prefix
        self.frames = [_Frame.over(draft)]
        self.env: dict[str, Any] = {}
        self._containers: dict[int, Container] = {}
        self._literals: set[int] = set()  # the storages of tensors that the graph itself holds
        self._entered: set[int] = set()  # of known tensors that have become constants
        self._regions = 0

    @property
    def draft(self) -> Draft:
        return self.frames[-1].draft

    @property
    def normalizer(self) -> Normalizer:
        return self.frames[-1].normalizer

    def run(self, scripted: torch.jit.ScriptModule, arguments: list[Any]) -> Any:
        """The value that `forward` returns on `arguments` (nodes and Python values), as a Python structure."""
        graph = scripted.inlined_graph
        inputs = list(graph.inputs())
        if len(inputs) != len(arguments) + 1:
            raise CaptureError(f"forward takes {len(inputs) - 1} arguments, {len(arguments)} are known")
        self.env[inputs[0].debugName()] = ModuleValue(scripted, "")
        self._given(arguments)
        for value, given in zip(inputs[1:], arguments, strict=True):
            self._bind(value, given)
        try:
            self._block(graph)
        except Raised as error:
            raise CaptureError(f"the model raises for these inputs: {error}") from None
        results = [self.env[v.debugName()] for v in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    def _given(self, value: Any) -> None:
        """Lists and dicts among the arguments belong to the caller."""
        if isinstance(value, (list, dict)):
            self._containers[id(value)] = Container(value, ARGUMENT, "")
        if isinstance(value, (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self._given(part)

    # -- values -------------------------------------------------------------------------------------------------------

    def _bind(self, value: Any, result: Any) -> None:
        """Let a TorchScript value stand for a result."""
        if isinstance(result, (list, dict)) and id(result) not in self._containers:
            annotation = value.type().annotation_str
            self._containers[id(result)] = Container(result, len(self.frames) - 1, annotation)
        self.env[value.debugName()] = result

    def _value(self, value: Any) -> Any:
        """What a TorchScript value stands for; a node as one of the graph under construction."""
        return self._here(self.env[value.debugName()])

    def _here(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or value.graph is self.draft.graph:
            return value
        depth = next(i for i, frame in enumerate(self.frames) if frame.draft.graph is value.graph)
        for frame in self.frames[depth + 1 :]:
            value = frame.operand(value)
        return value

    def all_here(self, value: Any) -> Any:
        """`_here` for every node in a structure of Python values."""
        if len(self.frames) == 1:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self.all_here(v) for v in value)
        if isinstance(value, dict):
            return {k: self.all_here(v) for k, v in value.items()}
        return self._here(value)

    def changes(self, container: Any) -> None:
        """To be called before a Python container is changed: a region may not change one that it did not make."""
        known = self._containers.get(id(container))
        if known is not None and known.depth == ATTRIBUTE:
            raise CaptureError("forward changes a list or dict that is an attribute, which is not supported; use a buffer")
        if known is not None and known.depth == ARGUMENT:
            raise CaptureError("forward changes a list or dict that it is given, which is not supported; return a new one")
        if known is not None and known.depth < len(self.frames) - 1:
            raise NeedsNode(container)

    def made_node(self, container: Any) -> fx.Node:
        """Turn a container of this frame into a node, wherever it is referred to."""
        self.changes(container)
        known = self._containers.pop(id(container))
        node = self.as_node(container, known.annotation)
        seen: set[int] = set()

        def replaced(value: Any) -> Any:
            if value is container:
                return node
            if isinstance(value, (list, dict, ObjectValue)):
                if id(value) in seen:
                    return value
                seen.add(id(value))
            if isinstance(value, ObjectValue):
                value.attributes = {k: replaced(v) for k, v in value.attributes.items()}
            elif isinstance(value, list):
                value[:] = [replaced(v) for v in value]
            elif isinstance(value, dict):
                value.update({k: replaced(v) for k, v in value.items()})
            elif isinstance(value, tuple) and any(isinstance(v, (list, dict, tuple, ObjectValue)) for v in value):
                return type(value)(replaced(v) for v in value)
            return value

        for name, value in self.env.items():
            if isinstance(value, (list, dict, tuple, ObjectValue)):
                self.env[name] = replaced(value)
        return node

    def as_node(self, value: Any, annotation: str) -> fx.Node:
        """A Python value as a node of that TorchScript type in the graph under construction."""
        value = self._here(value)
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, torch.Tensor):
            # A copy: the run may write into it. `purify` drops what is not needed.
            return self.draft.call(aten.clone.default, self.draft.constant("constant", value))
        if isinstance(value, (list, dict)) and id(value) in self._containers:
            return self.made_node(value)  # a node is another object: nobody may hold on to the old one
        if isinstance(value, dict):
            _, part = inner_types(annotation)
            node = self.draft.call(make_dict, list(value), [self.as_argument(v, part) for v in value.values()])
        elif isinstance(value, list):
            (part,) = inner_types(annotation)
            node = self.draft.call(make_list, *(self.as_argument(v, part) for v in value))
        elif isinstance(value, tuple):
            parts = [self.as_argument(v, t) for v, t in zip(value, inner_types(annotation), strict=True)]
            node = self.draft.call(make_tuple, *parts)
        else:
            raise CaptureError(f"a {type(value).__name__} cannot be a value of the run")
        set_value_type(node, annotation)
        return node

    def as_argument(self, value: Any, annotation: str) -> Any:
        """`as_node`, but numbers, strings, devices and None as they are."""
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.device, Uninitialized)):
            return value
        return self.as_node(value, annotation)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _block(self, block: Any) -> None:
        for node in block.nodes():
            self._node(node)

    def _node(self, node: Any) -> None:
        kind = node.kind()
        if kind == "prim::Constant":
            value = constant_value(node)
            if isinstance(value, torch.Tensor):
                self._literals.add(_storage(value))
            self._set(node, value)
            return
        if kind == "prim::If":
            self._if(node)
            return
        if kind == "prim::Loop":
            self._loop(node)
            return
        arguments = [self._value(v) for v in node.inputs()]
        if kind not in TAKES_TEXT and any(isinstance(a, TextOfData) for a in arguments):
            raise CaptureError(f"{kind}{where(node)} uses a string with values of the run in it, which is not supported")
        handler = HANDLERS.get(kind)
        with self.draft.origin(self._origin(node, arguments)):
            try:
                if handler is not None:
                    result = handler(self, node, arguments)
                    if result is not NotImplemented:
                        self._set(node, result)
                        return
                self._set(node, self.operator(node, arguments))
            except (Raised, CaptureError, NeedsNode):
                raise
            except Exception as error:
                raise CaptureError(f"{kind}{where(node)}: {first_line(error)}") from error

    def _set(self, node: Any, result: Any) -> None:
        outputs = list(node.outputs())
        if len(outputs) == 1:
            self._bind(outputs[0], result)
        elif outputs:
            for value, part in zip(outputs, result, strict=True):
                self._bind(value, part)

    # -- control flow -------------------------------------------------------------------------------------------------

    def _if(self, node: Any) -> None:
        condition = self._value(next(iter(node.inputs())))
        known = facts.holds_always(facts.fact(condition)) if isinstance(condition, fx.Node) else bool(condition)
        if known is None:
            self._retried(lambda: self._region_if(node, condition))
            return
        taken = list(node.blocks())[0 if known else 1]
        self._block(taken)
        for value, result in zip(node.outputs(), taken.outputs(), strict=True):
            self._bind(value, self.env[result.debugName()])

    def _loop(self, node: Any) -> None:
        (body,) = node.blocks()
        trips, condition, *carried = (self._value(v) for v in node.inputs())
        if isinstance(trips, int) and trips < NO_LIMIT and trips * count_nodes(body) > LARGEST_UNROLLED:
            self._retried(lambda: self._region_loop(node, 0))
            return
        count = 0
        while True:
            if isinstance(condition, fx.Node):
                known = facts.holds_always(facts.fact(condition))
                condition = condition if known is None else known
            unknown = isinstance(condition, fx.Node) or isinstance(trips, fx.Node)
            if unknown or (count == 0 and condition and self._stops_by_data(body, carried)):
                self._remaining(node, count, condition, carried)
                return
            if not condition or count >= trips:
                break
            if count * count_nodes(body) > LARGEST_UNROLLED:
                raise CaptureError(f"a loop runs more than {count} times{where(node)}")
            self._enter(body, count, carried)
            self._block(body)
            condition, *carried = (self._value(v) for v in body.outputs())
            count += 1
        for value, part in zip(node.outputs(), carried, strict=True):
            self._bind(value, part)

    def _enter(self, body: Any, count: Any, carried: Sequence[Any]) -> None:
        iteration, *body_inputs = body.inputs()
        self.env[iteration.debugName()] = count
        for value, part in zip(body_inputs, carried, strict=True):
            self._bind(value, part)

    def _remaining(self, node: Any, count: int, condition: Any, carried: Sequence[Any]) -> None:
        """The rounds from `count` on as a region. What they start from goes by the names of the loop's inputs."""
        if count:
            inputs = list(node.inputs())
            for value, part in zip(inputs[1:], (condition, *carried), strict=True):
                self.env[value.debugName()] = part
        self._retried(lambda: self._region_loop(node, count))

    def _stops_by_data(self, body: Any, carried: Sequence[Any]) -> bool:
        """Whether the loop goes on depends on the run: found by walking one round on copies, which are thrown away."""
        goes_on = next(iter(body.outputs()))
        if goes_on.node().kind() == "prim::Constant":
            return False
        env, containers = dict(self.env), dict(self._containers)
        try:
            with self._frame("trial_"):
                copies: dict[int, Any] = {}
                self.env = {name: self._copied(value, copies) for name, value in env.items()}
                self._enter(body, 0, [self._copied(value, copies) for value in carried])
                self._block(body)
                result = self._value(goes_on)
                return isinstance(result, fx.Node) and facts.holds_always(facts.fact(result)) is None
        except (Raised, CaptureError):
            return False  # it comes again, where it counts
        finally:
            self.env, self._containers = env, containers

    def _copied(self, value: Any, copies: dict[int, Any]) -> Any:
        """A structure with new lists and dicts, made by this frame; what was one object stays one."""
        if isinstance(value, tuple):
            return type(value)(self._copied(v, copies) for v in value)
        if not isinstance(value, (list, dict, ObjectValue)):
            return value
        if id(value) not in copies:
            copy: Any = ObjectValue(len(self.frames) - 1) if isinstance(value, ObjectValue) else type(value)()
            copies[id(value)] = copy
            known = self._containers.get(id(value))
            if known is not None:
                self._containers[id(copy)] = Container(copy, len(self.frames) - 1, known.annotation)
            if isinstance(value, ObjectValue):
                copy.attributes = {k: self._copied(v, copies) for k, v in value.attributes.items()}
            elif isinstance(value, dict):
                copy.update((k, self._copied(v, copies)) for k, v in value.items())
            else:
                copy.extend(self._copied(v, copies) for v in value)
        return copies[id(value)]

    # -- regions ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _frame(self, name: str) -> Iterator[_Frame]:
        """A body under construction, over the tables of the graph around it."""
        frame = _Frame.over(Draft.inside(self.draft, name))
        with self._inside(frame):
            yield frame

    @contextmanager
    def _inside(self, frame: _Frame) -> Iterator[None]:
        self.frames.append(frame)
        try:
            yield
        finally:
            self.frames.pop()

    def _retried(self, build: Callable[[], None]) -> None:
        """Walk a region; where it needs a container of this frame as a node, make that and walk it again."""
        while True:
            try:
                build()
                return
            except NeedsNode as need:
                if self._containers[id(need.container)].depth != len(self.frames) - 1:
                    raise
                self.made_node(need.container)

    def _region_if(self, node: Any, condition: fx.Node) -> None:
        self._regions += 1
        frames, results = [], []
        for block, name in zip(node.blocks(), ("then", "else"), strict=True):
            with self._frame(f"if{self._regions}_{name}_") as frame:
                frames.append(frame)
                results.append(self._results_of(block))
        if all(result is None for result in results):
            raise Raised(f"both sides of an if raise{where(node)}")
        slots: list[_Slot] = []
        plans = []
        for i, value in enumerate(node.outputs()):
            sides = [None if r is None else type_leaves(r[i], value.type()) for r in results]
            pairs = zip(_pairs(sides), leaf_types(value.type()), strict=True)
            plans.append([condition if a is True and b is False else self._slot(a, b, t, slots) for (a, b), t in pairs])
        parts: list[list[Any]] = []
        for side, frame in enumerate(frames):
            with self._inside(frame):
                given = [slot.sides[side] for slot in slots]
                parts.append([self._result(v, s.annotation) for v, s in zip(given, slots, strict=True)])
        mode = self.draft.program.mode
        values = [
            _join(mode, a, b, slot.annotation) for a, b, slot in zip(*parts, slots, strict=True)
        ]
        operands = list(dict.fromkeys(outer for frame in frames for outer in frame.operands))
        made = [self._close(frame, operands, part) for frame, part in zip(frames, parts, strict=True)]
        nodes: list[fx.Node] = []
        if slots or any(body.effects.matter for body in made):
            with self.draft.origin(self._origin(node, [])):
                types = [s.annotation for s in slots]
                nodes = self.draft.region(region_if, [self._here(condition), *made, operands], values, types)
        for value, plan in zip(node.outputs(), plans, strict=True):
            leaves = iter([nodes[leaf.index] if isinstance(leaf, _Slot) else leaf for leaf in plan])
            self._bind(value, from_leaves(value.type(), leaves))

    def _results_of(self, block: Any) -> list[Any] | None:
        """What a block gives, None when it raises."""
        try:
            self._block(block)
        except Raised as error:
            self.draft.call(fail, str(error))
            return None
        return [self.env[v.debugName()] for v in block.outputs()]

    def _slot(self, one: Any, other: Any, annotation: str, slots: list[_Slot]) -> Any:
        """One value where both sides of an if agree, else a slot among its results."""
        for value, unread in ((one, other), (other, one)):
            if unread is UNINITIALIZED and not self._is_local(value):
                return value
        if _same(one, other):
            return one
        slots.append(_Slot(len(slots), (one, other), annotation))
        return slots[-1]

    def _is_local(self, value: Any) -> bool:
        """A value that exists only inside the region just walked."""
        if isinstance(value, fx.Node):
            return all(frame.draft.graph is not value.graph for frame in self.frames)
        if isinstance(value, (list, dict)):
            known = self._containers.get(id(value))
            return known is None or known.depth > len(self.frames) - 1
        return isinstance(value, torch.Tensor)

    def _result(self, value: Any, annotation: str) -> Any:
        """A value as a result of the body under construction."""
        if value is UNINITIALIZED:
            return None
        return self.as_argument(value, annotation)

    def _close(
        self,
        frame: _Frame,
        operands: Sequence[fx.Node],
        results: Sequence[Any],
        before: Sequence[fx.Node] = (),
        carried: int = 0,
    ) -> Body:
        """The finished body: placeholders are `before`, then one for each of `operands`, in this order."""
        draft = frame.draft
        placeholders = [*before, *(frame.operand(n) for n in operands)]
        draft.output(results)
        purify(draft)
        draft.finish()
        for placeholder in reversed(placeholders):
            first = next(iter(draft.graph.nodes))
            if first is not placeholder:
                first.prepend(placeholder)
        self.draft.program.state |= draft.program.state
        return body_of(draft.program, carried)

    def _region_loop(self, node: Any, done: int) -> None:
        """The rounds from number `done` on, for values that go by the names of the loop's inputs."""
        trips, condition, *given = (self._value(v) for v in node.inputs())
        (block,) = node.blocks()
        iteration, *inputs = block.inputs()
        types = [t for v in inputs for t in leaf_types(v.type())]
        leaves = [leaf for v, value in zip(inputs, given, strict=True) for leaf in type_leaves(value, v.type())]
        carried = [self._result(leaf, t) for leaf, t in zip(leaves, types, strict=True)]
        mode = self.draft.program.mode
        assumed = [_slot_fact(mode, value, t) for value, t in zip(carried, types, strict=True)]
        free: set[Any] = set()
        for attempt in count():
            if attempt == MOST_ATTEMPTS:
                raise CaptureError(f"what the loop carries changes its shape in ways that cannot be followed{where(node)}")
            self._regions += 1
            widened = facts.Elements.widened
            with self._frame(f"loop{self._regions}_") as frame:
                number = frame.draft.operand("round", facts.unknown_number(mode, "int"), "int")
                operands = [
                    frame.draft.operand(f"carried{i}", known, t)
                    for i, (known, t) in enumerate(zip(assumed, types, strict=True))
                ]
                parts = iter(operands)
                self._enter(
                    block, frame.draft.call(aten.add.int, number, done) if done else number,
                    [from_leaves(v.type(), parts) for v in inputs],
                )  # fmt: skip
                results = self._results_of(block)
                if results is None:
                    results = [False, *(from_leaves(v.type(), iter(operands)) for v in inputs)]
                after = [leaf for v, r in zip(inputs, results[1:], strict=True) for leaf in type_leaves(r, v.type())]
                after = [self._result(leaf, t) for leaf, t in zip(after, types, strict=True)]
                goes_on = self._here(results[0])
                found = [_slot_fact(mode, value, t) for value, t in zip(after, types, strict=True)]
            wider = [
                facts.join(mode, fact, other, free) if is_tensor_type(t) else _same_elements(fact, other)
                for fact, other, t in zip(assumed, found, types, strict=True)
            ]
            if all(a is b for a, b in zip(wider, assumed, strict=True)) and facts.Elements.widened == widened:
                if facts.NOTHING not in wider:
                    break
                wider = [None if known is facts.NOTHING else known for known in wider]  # None in every round
            assumed = wider
        body = self._close(
            frame, list(frame.operands), [goes_on, *after], [number, *operands], len(operands)
        )
        limit = None if isinstance(trips, int) and trips >= NO_LIMIT else trips
        if done and limit is not None:
            limit = self.draft.call(aten.sub.int, limit, done) if isinstance(limit, fx.Node) else limit - done
        values = [_after_loop(mode, known, t, free) for known, t in zip(assumed, types, strict=True)]
        with self.draft.origin(self._origin(node, [])):
            nodes = self.draft.region(
                region_loop, [limit, condition, body, carried, list(frame.operands)], values, types
            )
        parts = iter(nodes)
        for value in node.outputs():
            self._bind(value, from_leaves(value.type(), parts))

    # -- operators ----------------------------------------------------------------------------------------------------

    def operator(self, node: Any, arguments: list[Any]) -> Any:
        overload = overload_of(node.schema(), node.kind(), where(node))
        of_the_run = holds(arguments, fx.Node)
        if of_the_run and is_host(overload):
            return self._host(node, overload, arguments)
        arguments = self.all_here(arguments)
        names = [(a.name, a.kwarg_only) for a in schema_of(overload).arguments]
        positional = [v for v, (_, keyword) in zip(arguments, names, strict=True) if not keyword]
        keywords = {name: v for v, (name, keyword) in zip(arguments, names, strict=True) if keyword}
        for written in written_arguments(overload):
            self._may_write(arguments[[name for name, _ in names].index(written)], node)
        if of_the_run or makes_a_tensor(overload):
            draws = torch.Tag.nondeterministic_seeded in overload.tags
            if not of_the_run and not draws and holds(arguments, torch.Tensor) and is_small(arguments):
                return self._compute(overload, positional, keywords)
            self._entered |= {_storage(leaf) for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}
            return self._results(overload, self.normalizer.call(overload, *positional, **keywords))
        return self._compute(overload, positional, keywords)

    def _may_write(self, value: Any, node: Any) -> None:
        """Refuse a write into a tensor made of numbers, known now, unless capture can do it once and for all."""
        if not isinstance(value, torch.Tensor):
            return
        # Tracing has written into the graph's own already, so that the value held is no longer the one to start from. What a
        # branch or loop of the run writes is not known now, and what has become a constant may not change.
        if _storage(value) in self._literals or _storage(value) in self._entered or len(self.frames) > 1:
            raise CaptureError(f"the model writes into a tensor that is no buffer{where(node)}; make it a buffer")

    def _compute(self, overload: OpOverload, positional: list[Any], keywords: dict[str, Any]) -> Any:
        """Run an operator now: all its arguments are known."""
        if overload.namespace == "aten":
            args, keywords = spell_arguments(overload, tuple(positional), keywords)
            positional = list(args)
        result = overload(*positional, **keywords)
        return NUMBER_OF_DTYPE[result] if isinstance(result, torch.dtype) else result

    def _host(self, node: Any, overload: OpOverload, arguments: list[Any]) -> Any:
        """An op on numbers or containers of the run; a number that is the same in every run is given as such."""
        if len(schema_of(overload).returns) > 1:
            raise CaptureError(f"{node.kind()} of a number of the run{where(node)} is not supported")
        types = [v.type().annotation_str for v in node.inputs()]
        given = [self.as_argument(a, t) for a, t in zip(arguments, types, strict=True)]
        new = self.draft.call(overload, *given)
        outputs = list(node.outputs())
        if not outputs or not schema_of(overload).returns:
            return given[0] if outputs else ()
        set_value_type(new, outputs[0].type().annotation_str)
        known = facts.fact(new)
        if isinstance(known, (bool, int, float, str, torch.device)):
            return known
        if any(a.alias_info is not None and a.alias_info.is_write for a in schema_of(overload).arguments[:1]) and (
            schema_of(overload).name in ("aten::append", "aten::add_", "aten::_set_item")
        ):
            return given[0]
        return new

    def _results(self, overload: OpOverload, value: Any) -> Any:
        """A node with several results as a Python list of them."""
        known = facts.fact(value) if isinstance(value, fx.Node) else None
        returns = [r.type.annotation_str for r in schema_of(overload).returns]
        if isinstance(value, fx.Node) and known is None and len(returns) > 1:
            return tuple(part_of(self, value, i, annotation) for i, annotation in enumerate(returns))
        if isinstance(known, (tuple, list)):
            parts = [self.draft.call(getitem, value, i) for i in range(len(known))]
            return parts if isinstance(known, list) and len(schema_of(overload).returns) == 1 else tuple(parts)
        if isinstance(value, fx.Node) and known is None and len(returns) == 1:
            set_value_type(value, returns[0])
        return value

    def _origin(self, node: Any, arguments: list[Any]) -> Origin:
        scope = node.scopeName().rsplit("/", 1)[-1].removeprefix("__module.")
        path = self._cut(scope)
        if not path:
            constants = [a for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"]
            path = str(constants[0].target).rpartition(".")[0] if constants else ""
        return Origin(path, source_line(node.sourceRange()))

    def _cut(self, path: str) -> str:
        return "" if path == self.prefix.rstrip(".") else path.removeprefix(self.prefix)

    # -- attributes ---------------------------------------------------------------------------------------------------

    def get_attribute(self, owner: ModuleValue, name: str) -> Any:
        value = getattr(owner.module, name)
        path = f"{owner.path}.{name}" if owner.path else name
        if isinstance(value, torch.jit.ScriptModule) or (wraps_script_object(value) and not isinstance(value, torch.Tensor)):
            return ModuleValue(value, path)
        return self._known(value, self._cut(path))

    def _attribute(self, container: Any) -> Any:
        self._containers[id(container)] = Container(container, ATTRIBUTE, "")
        return container

    def _known(self, value: Any, path: str) -> Any:
        """A constant or attribute of the module: its tensors become constants, containers stay containers."""
        if isinstance(value, torch.Tensor):
            # A weight packed for oneDNN is opaque; its plain form is exact.
            return self.draft.constant(path, value.to_dense() if value.is_mkldnn else value)
        if isinstance(value, (list, tuple)):
            parts = type(value)(self._known(v, f"{path}.{i}") for i, v in enumerate(value))
            return self._attribute(parts) if isinstance(parts, list) else parts
        if isinstance(value, dict):
            return self._attribute({k: self._known(v, f"{path}.{k}") for k, v in value.items()})
        return NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


@dataclass(frozen=True, eq=False)
class _Slot:
    """One result of an if: what each side gives, and its TorchScript type."""

    index: int
    sides: tuple[Any, Any]
    annotation: str


def _storage(value: torch.Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _pairs(sides: Sequence[list[Any] | None]) -> list[tuple[Any, Any]]:
    """The leaves of both sides; a side that raises gives nothing that is read."""
    one, other = sides
    if one is None:
        return [(UNINITIALIZED, v) for v in other or ()]
    return list(zip(one, [UNINITIALIZED] * len(one) if other is None else other, strict=True))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (bool, int, float, str, torch.device)
    return type(one) is type(other) and isinstance(one, plain) and one == other


def _slot_fact(mode: Any, value: Any, annotation: str) -> Any:
    """What is known of a value that a region hands on: a tensor's fact (where it is one), a symbol for a number."""
    if not is_tensor_type(annotation):
        return facts.fact(value) if annotation.startswith(("List[", "Dict[")) else facts.unknown_number(mode, annotation)
    return facts.NOTHING if value is None else facts.fact(value)


def _after_loop(mode: Any, known: Any, annotation: str, free: set[Any]) -> Any:
    """What is known of a carried value when the loop is over."""
    if is_tensor_type(annotation):
        return facts.fresh(mode, known, free)
    return known if isinstance(known, facts.Elements) else facts.unknown_number(mode, annotation)


def _same_elements(one: Any, other: Any) -> Any:
    """The fact of a number stays its symbol; that of a container is lost where a round puts another in its place."""
    return None if isinstance(one, facts.Elements) and other is not one else one


def _join(mode: Any, one: Any, other: Any, annotation: str) -> Any:
    """What is known of a result of an if."""
    known = [_slot_fact(mode, value, annotation) for value in (one, other)]
    if is_tensor_type(annotation):
        return facts.join(mode, *known)
    return known[0] if known[0] is known[1] else facts.unknown_number(mode, annotation)
