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

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ir_tools.errors import first_line
from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.fx_graph import source_line
from ir_tools.frontends.normalize import Normalizer, purify
from ir_tools.ir import Draft, Origin, facts
from ir_tools.ir.dialect import DTYPE_NUMBERS, getitem, spell_arguments, written_arguments, written_nodes
from ir_tools.ir.host import TENSOR, fail, inner_types, is_host, make_dict, make_list, make_tuple, set_value_type, value_type
from ir_tools.ir.program import body_of
from ir_tools.ir.regions import Body, region_if, region_loop

aten = torch.ops.aten
LARGEST_UNROLLED = 20_000
"""Nodes of TorchScript that unrolling a loop may give; a longer one stays a loop."""
ATTRIBUTE = -1
"""The depth of a container that is an attribute of a module."""
NO_LIMIT = 1 << 62
"""From this trip count on a loop has no limit but its condition."""
_NUMBER_OF_DTYPE = {dtype: number for number, dtype in DTYPE_NUMBERS.items()}


@dataclass(frozen=True)
class ModuleValue:
    """A submodule: its TorchScript object and its path from the root."""

    module: Any
    path: str


class _Uninitialized:
    """What a variable holds on a path where nobody reads it."""

    def __repr__(self) -> str:
        return "uninitialized"


UNINITIALIZED = _Uninitialized()


class TextOfData(str):
    """A message with values of the run in it, of which only the template is known."""


class Raised(Exception):
    """The graph raises, whatever the inputs are."""


class NeedsNode(Exception):
    """A region changes a container that is still a Python value of an outer frame."""

    def __init__(self, container: Any):
        super().__init__("a container must become a node")
        self.container = container


@dataclass
class _Container:
    """A list or dict of the walk: the object itself, the depth of the frame that made it, its TorchScript type."""

    value: Any
    depth: int
    annotation: str


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
        self._containers: dict[int, _Container] = {}
        self._literals: set[int] = set()  # the storages of tensors that the graph itself holds
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
        for value, given in zip(inputs[1:], arguments, strict=True):
            self._bind(value, given)
        try:
            self._block(graph)
        except Raised as error:
            raise CaptureError(f"the model raises for these inputs: {error}") from None
        results = [self.env[v.debugName()] for v in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    # -- values -------------------------------------------------------------------------------------------------------

    def _bind(self, value: Any, result: Any) -> None:
        """Let a TorchScript value stand for a result."""
        if isinstance(result, (list, dict)) and id(result) not in self._containers:
            annotation = value.type().annotation_str
            self._containers[id(result)] = _Container(result, len(self.frames) - 1, annotation)
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

    def _all_here(self, value: Any) -> Any:
        """`_here` for every node in a structure of Python values."""
        if len(self.frames) == 1:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self._all_here(v) for v in value)
        if isinstance(value, dict):
            return {k: self._all_here(v) for k, v in value.items()}
        return self._here(value)

    def changes(self, container: Any) -> None:
        """To be called before a Python container is changed: a region may not change one that it did not make."""
        known = self._containers.get(id(container))
        if known is not None and known.depth == ATTRIBUTE:
            raise CaptureError("forward changes a list or dict that is an attribute, which is not supported; use a buffer")
        if known is not None and known.depth < len(self.frames) - 1:
            raise NeedsNode(container)

    def made_node(self, container: Any) -> fx.Node:
        """Turn a container of this frame into a node, wherever it is referred to."""
        self.changes(container)
        known = self._containers.pop(id(container))
        node = self.as_node(container, known.annotation)

        def replaced(value: Any) -> Any:
            if value is container:
                return node
            if isinstance(value, list):
                value[:] = [replaced(v) for v in value]
            elif isinstance(value, dict):
                value.update({k: replaced(v) for k, v in value.items()})
            elif isinstance(value, tuple) and any(isinstance(v, (list, dict, tuple)) for v in value):
                return type(value)(replaced(v) for v in value)
            return value

        for name, value in self.env.items():
            if isinstance(value, (list, dict, tuple)):
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
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.device, _Uninitialized)):
            return value
        return self.as_node(value, annotation)

    # -- blocks -------------------------------------------------------------------------------------------------------

    def _block(self, block: Any) -> None:
        for node in block.nodes():
            self._node(node)

    def _node(self, node: Any) -> None:
        kind = node.kind()
        if kind == "prim::Constant":
            value = _constant_value(node)
            if isinstance(value, torch.Tensor):
                self._literals.add(value.untyped_storage().data_ptr())
            self._set(node, value)
            return
        if kind == "prim::If":
            self._if(node)
            return
        if kind == "prim::Loop":
            self._loop(node)
            return
        arguments = [self._value(v) for v in node.inputs()]
        if kind not in _TAKES_TEXT and any(isinstance(a, TextOfData) for a in arguments):
            raise CaptureError(f"{kind}{where(node)} uses a string with values of the run in it, which is not supported")
        handler = _HANDLERS.get(kind)
        with self.draft.origin(self._origin(node, arguments)):
            try:
                if handler is not None:
                    result = handler(self, node, arguments)
                    if result is not NotImplemented:
                        self._set(node, result)
                        return
                self._set(node, self._operator(node, arguments))
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
        iteration, *body_inputs = body.inputs()
        trips, condition, *carried = (self._value(v) for v in node.inputs())
        if isinstance(trips, int) and trips < NO_LIMIT and trips * _count(body) > LARGEST_UNROLLED:
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
            if count * _count(body) > LARGEST_UNROLLED:
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
        if not isinstance(value, (list, dict)):
            return value
        if id(value) not in copies:
            copy: Any = type(value)()
            copies[id(value)] = copy
            known = self._containers.get(id(value))
            if known is not None:
                self._containers[id(copy)] = _Container(copy, len(self.frames) - 1, known.annotation)
            if isinstance(value, dict):
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
            sides = [None if r is None else _leaves(r[i], value.type()) for r in results]
            pairs = zip(_pairs(sides), _leaf_types(value.type()), strict=True)
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
            self._bind(value, _structure(value.type(), leaves))

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
        placeholders = [*before, *(frame.operands.get(n) or _unread(draft, n) for n in operands)]
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
        types = [t for v in inputs for t in _leaf_types(v.type())]
        leaves = [leaf for v, value in zip(inputs, given, strict=True) for leaf in _leaves(value, v.type())]
        carried = [self._result(leaf, t) for leaf, t in zip(leaves, types, strict=True)]
        mode = self.draft.program.mode
        assumed = [_slot_fact(mode, value, t) for value, t in zip(carried, types, strict=True)]
        free: set[Any] = set()
        while True:
            self._regions += 1
            widened = facts.Elements.widened
            with self._frame(f"loop{self._regions}_") as frame:
                count = frame.draft.operand("round", facts.unknown_number(mode, "int"), "int")
                operands = [
                    frame.draft.operand(f"carried{i}", known, t)
                    for i, (known, t) in enumerate(zip(assumed, types, strict=True))
                ]
                parts = iter(operands)
                self._enter(
                    block, frame.draft.call(aten.add.int, count, done) if done else count,
                    [_structure(v.type(), parts) for v in inputs],
                )  # fmt: skip
                results = self._results_of(block)
                if results is None:
                    results = [False, *(_structure(v.type(), iter(operands)) for v in inputs)]
                after = [leaf for v, r in zip(inputs, results[1:], strict=True) for leaf in _leaves(r, v.type())]
                after = [self._result(leaf, t) for leaf, t in zip(after, types, strict=True)]
                goes_on = self._here(results[0])
                found = [_slot_fact(mode, value, t) for value, t in zip(after, types, strict=True)]
            wider = [
                facts.join(mode, fact, other, free) if _is_tensor(t) else _same_elements(fact, other)
                for fact, other, t in zip(assumed, found, types, strict=True)
            ]
            if all(a is b for a, b in zip(wider, assumed, strict=True)) and facts.Elements.widened == widened:
                if facts.NOTHING not in wider:
                    break
                wider = [None if known is facts.NOTHING else known for known in wider]  # None in every round
            assumed = wider
        body = self._close(
            frame, list(frame.operands), [goes_on, *after], [count, *operands], len(operands)
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
            self._bind(value, _structure(value.type(), parts))

    # -- operators ----------------------------------------------------------------------------------------------------

    def _operator(self, node: Any, arguments: list[Any]) -> Any:
        overload = _overload(node.schema(), node.kind(), where(node))
        of_the_run = _holds(arguments, fx.Node)
        if of_the_run and is_host(overload):
            return self._host(node, overload, arguments)
        arguments = self._all_here(arguments)
        names = [(a.name, a.kwarg_only) for a in overload._schema.arguments]
        positional = [v for v, (_, keyword) in zip(arguments, names, strict=True) if not keyword]
        keywords = {name: v for v, (name, keyword) in zip(arguments, names, strict=True) if keyword}
        for written in written_arguments(overload):
            value = arguments[[name for name, _ in names].index(written)]
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._literals:
                # Tracing has written already, so that the value held is no longer the one to start from.
                raise CaptureError(f"the model writes into a tensor that is no buffer{where(node)}; make it a buffer")
        if of_the_run or _makes_a_tensor(overload):
            if not of_the_run and _holds(arguments, torch.Tensor) and _is_small(arguments):
                return self._compute(overload, positional, keywords)
            return self._results(overload, self.normalizer.call(overload, *positional, **keywords))
        return self._compute(overload, positional, keywords)

    def _compute(self, overload: OpOverload, positional: list[Any], keywords: dict[str, Any]) -> Any:
        """Run an operator now: all its arguments are known."""
        if overload.namespace == "aten":
            args, keywords = spell_arguments(overload, tuple(positional), keywords)
            positional = list(args)
        result = overload(*positional, **keywords)
        return _NUMBER_OF_DTYPE[result] if isinstance(result, torch.dtype) else result

    def _host(self, node: Any, overload: OpOverload, arguments: list[Any]) -> Any:
        """An op on numbers or containers of the run; a number that is the same in every run is given as such."""
        types = [v.type().annotation_str for v in node.inputs()]
        given = [self.as_argument(a, t) for a, t in zip(arguments, types, strict=True)]
        new = self.draft.call(overload, *given)
        outputs = list(node.outputs())
        if not outputs or not overload._schema.returns:
            return given[0] if outputs else ()
        set_value_type(new, outputs[0].type().annotation_str)
        known = facts.fact(new)
        if isinstance(known, (bool, int, float, str, torch.device)):
            return known
        if any(a.alias_info is not None and a.alias_info.is_write for a in overload._schema.arguments[:1]) and (
            overload._schema.name in ("aten::append", "aten::add_", "aten::_set_item")
        ):
            return given[0]
        return new

    def _results(self, overload: OpOverload, value: Any) -> Any:
        """A node with several results as a Python list of them."""
        known = facts.fact(value) if isinstance(value, fx.Node) else None
        returns = [r.type.annotation_str for r in overload._schema.returns]
        if isinstance(value, fx.Node) and known is None and len(returns) > 1:
            return tuple(_part(self, value, i, annotation) for i, annotation in enumerate(returns))
        if isinstance(known, (tuple, list)):
            parts = [self.draft.call(getitem, value, i) for i in range(len(known))]
            return parts if isinstance(known, list) and len(overload._schema.returns) == 1 else tuple(parts)
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
        if isinstance(value, torch.jit.ScriptModule) or (hasattr(value, "_c") and not isinstance(value, torch.Tensor)):
            return ModuleValue(value, path)
        return self._known(value, self._cut(path))

    def _attribute(self, container: Any) -> Any:
        self._containers[id(container)] = _Container(container, ATTRIBUTE, "")
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
        return _NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


@dataclass(frozen=True, eq=False)
class _Slot:
    """One result of an if: what each side gives, and its TorchScript type."""

    index: int
    sides: tuple[Any, Any]
    annotation: str


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


def _leaf_types(type_: Any) -> list[str]:
    """The TorchScript types of a value's parts: a tuple is taken apart."""
    if type_.kind() == "TupleType":
        return [leaf for element in type_.elements() for leaf in _leaf_types(element)]
    return [type_.annotation_str]


def _leaves(value: Any, type_: Any) -> list[Any]:
    if type_.kind() != "TupleType":
        return [value]
    if value is UNINITIALIZED:
        return [value] * len(_leaf_types(type_))
    if isinstance(value, fx.Node):
        raise CaptureError(f"a tuple out of a container ({type_.annotation_str}) is handed through control flow, not supported")
    return [leaf for part, element in zip(value, type_.elements(), strict=True) for leaf in _leaves(part, element)]


def _structure(type_: Any, leaves: Iterator[Any]) -> Any:
    """The value of a type from its leaves: the inverse of `_leaves`."""
    if type_.kind() == "TupleType":
        return tuple(_structure(element, leaves) for element in type_.elements())
    return next(leaves)


def _is_tensor(annotation: str) -> bool:
    return annotation in (TENSOR, f"Optional[{TENSOR}]")


def _slot_fact(mode: Any, value: Any, annotation: str) -> Any:
    """What is known of a value that a region hands on: a tensor's fact (where it is one), a symbol for a number."""
    if not _is_tensor(annotation):
        return facts.fact(value) if annotation.startswith(("List[", "Dict[")) else facts.unknown_number(mode, annotation)
    return facts.NOTHING if value is None else facts.fact(value)


def _after_loop(mode: Any, known: Any, annotation: str, free: set[Any]) -> Any:
    """What is known of a carried value when the loop is over."""
    if _is_tensor(annotation):
        return facts.fresh(mode, known, free)
    return known if isinstance(known, facts.Elements) else facts.unknown_number(mode, annotation)


def _same_elements(one: Any, other: Any) -> Any:
    """The fact of a number stays its symbol; that of a container is lost where a round puts another in its place."""
    return None if isinstance(one, facts.Elements) and other is not one else one


def _join(mode: Any, one: Any, other: Any, annotation: str) -> Any:
    """What is known of a result of an if."""
    known = [_slot_fact(mode, value, annotation) for value in (one, other)]
    if _is_tensor(annotation):
        return facts.join(mode, *known)
    return known[0] if known[0] is known[1] else facts.unknown_number(mode, annotation)


def _unread(draft: Draft, outer: fx.Node) -> fx.Node:
    """A placeholder for what only the other side of an if reads."""
    return draft.operand(outer.name, facts.fact(outer), value_type(outer))


def _count(block: Any) -> int:
    """The nodes of a TorchScript block, nested ones included."""
    return sum(1 + sum(_count(inner) for inner in node.blocks()) for node in block.nodes())


def flat_values(draft: Draft, value: Any, tree: pytree.TreeSpec) -> list[Any]:
    """The tensors in a returned value of the structure `tree`, in pytree order.

    Refuses numbers that only the run knows. A list or dict of the run is taken apart; one of another length than `tree` says
    makes the run raise.
    """
    children = tree.children() if not tree.is_leaf() else []
    if isinstance(value, fx.Node) and value_type(value) != TENSOR:
        parts = _parts_of_the_run(draft, value, tree)
        return [v for part, child in zip(parts, children, strict=True) for v in flat_values(draft, part, child)]
    if isinstance(value, (fx.Node, torch.Tensor)):
        return [value]
    if isinstance(value, dict):
        return [v for key, child in zip(tree.context, children) for v in flat_values(draft, value[key], child)]
    if isinstance(value, (list, tuple)) and children:
        return [v for part, child in zip(value, children, strict=True) for v in flat_values(draft, part, child)]
    return []


def _parts_of_the_run(draft: Draft, value: fx.Node, tree: pytree.TreeSpec) -> list[fx.Node]:
    """The elements of a list, tuple or dict of the run, made sure to be as many as `tree` has."""
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


def where(node: Any) -> str:
    line = source_line(node.sourceRange())
    return f" (at {line})" if line else ""


def _constant_value(node: Any) -> Any:
    (output,) = node.outputs()
    value = output.toIValue() if node.hasAttribute("value") else None
    return _NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


@lru_cache(maxsize=4096)
def _overload(schema: str, kind: str, at: str) -> OpOverload:
    """The overload behind a node, from its printed schema."""
    match = re.match(r"(\w+)::(\w+)(?:\.(\w+))?\(", schema)
    if match is None:
        raise CaptureError(f"{kind} has no operator schema{at}; it cannot be captured")
    namespace, name, overload = match.groups()
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload or "default")
    except AttributeError as error:
        raise CaptureError(f"the operator {namespace}::{name} is not registered in this process{at}") from error


def _holds(values: Any, kind: type) -> bool:
    if isinstance(values, kind):
        return True
    if isinstance(values, dict):
        return any(_holds(v, kind) for v in values.values())
    return isinstance(values, (list, tuple)) and any(_holds(v, kind) for v in values)


def _is_small(values: Any) -> bool:
    """Tensors made from numbers (sizes, mostly) are computed now; anything large stays an op."""
    if isinstance(values, torch.Tensor):
        return values.numel() <= 16
    return not isinstance(values, (list, tuple)) or all(_is_small(v) for v in values)


def _makes_a_tensor(overload: OpOverload) -> bool:
    return any("Tensor" in str(r.type) for r in overload._schema.returns)


# -- handlers: what a kind of node means, on Python values ------------------------------------------------------------------

Handler = Callable[[GraphWalk, Any, list[Any]], Any]
_HANDLERS: dict[str, Handler] = {}


def _handles(*kinds: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for kind in kinds:
            _HANDLERS[kind] = function
        return function

    return register


@_handles("prim::GetAttr")
def _get_attr(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return walk.get_attribute(a[0], node.s("name"))


@_handles("prim::SetAttr")
def _set_attr(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    """`self.n += 1` writes in place and then sets the attribute to itself; anything else rebinds, and is refused."""
    old = walk.get_attribute(a[0], node.s("name"))
    new = a[1]
    while isinstance(new, fx.Node) and new is not old and new.op == "call_function" and written_nodes(new):
        new = new.args[0]
    if new is not old:
        raise CaptureError(f"forward assigns self.{node.s('name')}{where(node)}; write into a buffer in place instead (copy_)")
    return ()


@_handles("prim::ListConstruct")
def _list(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return list(a)


@_handles("prim::TupleConstruct")
def _tuple(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return tuple(a)


@_handles("prim::DictConstruct")
def _dict(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return dict(zip(a[::2], a[1::2], strict=True))


@_handles("prim::ListUnpack", "prim::TupleUnpack")
def _unpack(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    parts = a[0]
    if isinstance(parts, fx.Node):
        parts = [_part(walk, parts, i, v.type().annotation_str) for i, v in enumerate(node.outputs())]
    return parts[0] if node.outputsSize() == 1 else parts


def _part(walk: GraphWalk, container: fx.Node, index: int, annotation: str) -> fx.Node:
    """A part of a tuple or list of the run."""
    part = walk.draft.call(getitem, container, index)
    set_value_type(part, annotation)
    return part


@_handles("prim::TupleIndex")
def _tuple_index(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return _part(walk, a[0], a[1], next(iter(node.outputs())).type().annotation_str)
    return a[0][a[1]]


@_handles("prim::TupleSlice")
def _tuple_slice(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0][node.i("beg") : node.i("end")]


@_handles("prim::RaiseException")
def _raise(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise Raised(str(a[0]) if isinstance(a[0], str) and a[0] else f"an assertion of the model failed{where(node)}")


@_handles("prim::Uninitialized")
def _uninitialized(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return UNINITIALIZED


@_handles("prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::_unwrap_optional")
def _unwrap(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    """A value that is known not to be None here."""
    if not isinstance(a[0], fx.Node) or not value_type(a[0]).startswith("Optional["):
        return a[0]
    wanted = next(iter(node.outputs())).type().annotation_str
    if value_type(a[0]) != f"Optional[{wanted}]":
        raise CaptureError(f"a {value_type(a[0])} is taken for a {wanted}{where(node)}, which is not supported")
    new = walk.draft.call(aten._unwrap_optional.default, a[0])
    set_value_type(new, wanted)
    return new


@_handles("prim::rangelist_identity")
def _same_value(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0]


@_handles("prim::Print", "aten::warn")
def _nothing(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return ()


_DTYPE_OF_TYPE = {"int": torch.int64, "float": torch.float64, "bool": torch.bool}


def _as_tensor(walk: GraphWalk, value: Any, dtype: torch.dtype | None) -> Any:
    """A number, or a list of numbers, of the run as a tensor."""
    if isinstance(value, (list, tuple)):
        return walk.normalizer.call(aten.stack.default, [_as_tensor(walk, v, dtype) for v in value], 0)
    if isinstance(value, fx.Node) and value_type(value) not in _DTYPE_OF_TYPE:
        raise CaptureError(f"a tensor is made from a {value_type(value)} of the run, which is not supported")
    kind = value_type(value) if isinstance(value, fx.Node) else type(value).__name__
    if isinstance(value, fx.Node) and kind == "bool":
        value = walk.draft.call(aten.Int.bool, value)  # TorchScript has no bool numbers
    wanted = dtype or (torch.get_default_dtype() if kind == "float" else _DTYPE_OF_TYPE[kind])
    return walk.normalizer.call(aten.scalar_tensor.default, value, dtype=wanted)


@_handles("prim::NumToTensor")
def _num_to_tensor(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return _as_tensor(walk, a[0], _DTYPE_OF_TYPE.get(value_type(a[0])))
    return torch.tensor(a[0])


@_handles("aten::tensor", "aten::as_tensor", "aten::scalar_tensor")
def _tensor(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    dtype = DTYPE_NUMBERS[a[1]] if len(a) > 1 and a[1] is not None else None
    if _holds(a[0], fx.Node):
        if isinstance(a[0], fx.Node) and value_type(a[0]) == TENSOR and node.kind() == "aten::as_tensor":
            wanted = dtype or facts.dtype(a[0])
            return a[0] if wanted is facts.dtype(a[0]) else walk.draft.call(aten.to.dtype, a[0], wanted)
        return _as_tensor(walk, walk._all_here(a[0]), dtype)
    return torch.as_tensor(a[0], dtype=dtype) if isinstance(a[0], torch.Tensor) else torch.tensor(a[0], dtype=dtype)


@_handles("aten::Int", "aten::Float", "aten::Bool", "aten::item", "aten::IntImplicit", "aten::FloatImplicit",
          "aten::ScalarImplicit", "prim::ImplicitTensorToNum")  # fmt: skip
def _number(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return NotImplemented
    convert = {"Int": int, "IntImplicit": int, "Float": float, "FloatImplicit": float, "Bool": bool}
    name = node.kind().split("::")[1]
    value = a[0].item() if isinstance(a[0], torch.Tensor) else a[0]
    return convert[name](value) if name in convert else value


@_handles("aten::size", "aten::sym_size")
def _size(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    rank = a[0].dim() if isinstance(a[0], torch.Tensor) else facts.rank(a[0])
    if rank is None or (len(a) == 2 and isinstance(a[1], fx.Node)):
        return NotImplemented
    sizes = [walk_size(walk, a[0], i) for i in range(rank)] if len(a) == 1 else None
    return sizes if sizes is not None else walk_size(walk, a[0], a[1] % rank if rank else a[1])


def walk_size(walk: GraphWalk, value: Any, dim: int) -> Any:
    """One size of a tensor of known rank: the number where it is known now, else a node that reads it."""
    known = facts.size(facts.fact(value).shape[dim])
    return known if isinstance(known, int) else walk.draft.call(aten.size.int, value, dim)


@_handles("aten::dim")
def _dim(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    rank = facts.rank(a[0])
    return NotImplemented if rank is None else rank


@_handles("aten::numel")
def _numel(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    shape = facts.shape(a[0])
    if shape is None or not all(isinstance(s, int) for s in shape):
        return NotImplemented
    return torch.Size(shape).numel()


@_handles("aten::stride")
def _stride(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"the model reads strides{where(node)}, which a compiler that may change layouts cannot keep")


@_handles("prim::dtype", "prim::device", "prim::layout", "prim::is_cuda", "prim::is_cpu", "prim::requires_grad",
          "prim::is_quantized", "prim::is_mkldnn", "prim::is_sparse", "prim::is_mps", "prim::is_meta", "prim::is_xla",
          "prim::is_nested", "aten::is_floating_point", "aten::is_complex")  # fmt: skip
def _tensor_fact(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    known = a[0] if isinstance(a[0], torch.Tensor) else facts.fact(a[0])
    if not isinstance(known, torch.Tensor):
        if node.kind() in ("prim::device", "aten::is_floating_point", "aten::is_complex"):
            return NotImplemented
        raise CaptureError(f"{node.kind()} of a tensor of which too little is known at capture{where(node)}")
    name = node.kind().split("::")[1]
    if name == "dtype":
        return _NUMBER_OF_DTYPE[known.dtype]
    if name == "requires_grad":
        return False
    if name == "layout":
        return 0
    value = getattr(known, name)
    return value() if callable(value) else value


@_handles("aten::__is__", "aten::__isnot__")
def _is(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    nodes = [v for v in a if isinstance(v, fx.Node)]
    if any(v is None for v in a) and any(value_type(v).startswith("Optional[") for v in nodes):
        return NotImplemented
    same = a[0] is a[1]
    return same if node.kind() == "aten::__is__" else not same


@_handles("prim::isinstance")
def _is_instance(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    """Decided by what the value is; one that may be None at run time is not decided here."""
    wanted = [t.annotation_str for t in node.tys("types")]
    value = a[0]
    given = value_type(value) if isinstance(value, fx.Node) else type(value).__name__
    if given in wanted or (value is None and "None" in " ".join(wanted)):
        return True
    if isinstance(value, fx.Node) and given.startswith(("Optional[", "Union[", "Any")):
        raise CaptureError(f"isinstance of a value that may be of several types{where(node)} is not supported")
    if isinstance(value, (list, tuple, dict)):
        raise CaptureError(f"isinstance of a {given}{where(node)} is not supported")
    return False


@_handles("prim::HasAttr")
def _unsupported(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"{node.kind()}{where(node)} is not supported")


@_handles("aten::dict")
def _new_dict(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return dict(a[0]) if a else {}


def _on_container(function: Callable[..., Any], changes: bool = False) -> Handler:
    """A handler that acts when its first argument is a Python container or string and the others are known as well.

    Everything else is left to the operator. `changes`: the first argument is changed.
    """

    def handler(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
        if not isinstance(a[0], (list, tuple, dict, str)):
            return NotImplemented
        if node.kind() in _BY_KEY and isinstance(a[1], fx.Node):
            return NotImplemented
        if changes:
            walk.changes(a[0])
        return function(*a)

    return handler


_BY_KEY = frozenset("aten::__getitem__ aten::_set_item aten::Delete aten::__contains__ aten::mul".split())
"""With a key or count of the run, even a container that is known is read or changed by the run."""


def _set_item(container: Any, key: Any, value: Any) -> Any:
    container[key] = value
    return container


def _delete(container: Any, key: Any) -> tuple:
    del container[key]
    return ()


def _in_place(method: str) -> Callable[..., Any]:
    def function(container: Any, *args: Any) -> Any:
        getattr(container, method)(*args)
        return container

    return function


@_handles("aten::slice")
def _slice(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if not isinstance(a[0], (list, tuple, str)) or any(isinstance(v, fx.Node) for v in a[1:]):
        return NotImplemented
    return a[0][a[1] : a[2] : a[3]]


@_handles("aten::extend", "aten::add_", "aten::update")
def _join_in_place(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if not isinstance(a[0], (list, dict)):
        return NotImplemented
    walk.changes(a[0])
    if isinstance(a[1], fx.Node):  # of unknown length
        return walk._operator(node, [walk.made_node(a[0]), a[1]])
    a[0].update(a[1]) if isinstance(a[0], dict) else a[0].extend(a[1])
    return a[0]


@_handles("aten::add", "aten::eq", "aten::ne")
def _on_two(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    one, other = a[:2]
    containers = (list, tuple, dict, str)
    if not isinstance(one, containers) or not isinstance(other, containers):
        return NotImplemented
    if node.kind() == "aten::add":
        return operator.add(one, other)
    if _holds(a, fx.Node):
        return NotImplemented
    return (one == other) is (node.kind() == "aten::eq")


@_handles("aten::format")
def _format(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if any(isinstance(v, (fx.Node, TextOfData)) for v in a):
        return TextOfData(a[0].format(*("<value>" if isinstance(v, fx.Node) else v for v in a[1:])))
    return a[0].format(*a[1:])


_TAKES_TEXT = frozenset({"prim::RaiseException", "prim::Print", "aten::warn", "aten::format", "aten::add", "aten::join"})

_HANDLERS.update({
    "aten::__getitem__": _on_container(lambda c, key: c[key]),
    "aten::_set_item": _on_container(_set_item, changes=True),
    "aten::Delete": _on_container(_delete, changes=True),
    "aten::append": _on_container(_in_place("append"), changes=True),
    "aten::insert": _on_container(_in_place("insert"), changes=True),
    "aten::reverse": _on_container(_in_place("reverse"), changes=True),
    "aten::clear": _on_container(_in_place("clear"), changes=True),
    "aten::pop": _on_container(lambda c, *a: c.pop(*a), changes=True),
    "aten::copy": _on_container(lambda c: c.copy()),
    "aten::list": _on_container(list),
    "aten::keys": _on_container(lambda c: list(c)),
    "aten::values": _on_container(lambda c: list(c.values())),
    "aten::items": _on_container(lambda c: list(c.items())),
    "aten::get": _on_container(lambda c, *a: c.get(*a)),
    "aten::__contains__": _on_container(lambda c, key: key in c),
    "aten::mul": _on_container(lambda x, n: x * n),
    "aten::join": _on_container(lambda text, parts: text.join(parts)),
})  # fmt: skip


@_handles("aten::len")
def _length(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], (list, tuple, dict, str)):
        return len(a[0])
    return walk_size(walk, a[0], 0) if value_type(a[0]) == TENSOR and facts.rank(a[0]) else NotImplemented
