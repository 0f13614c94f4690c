"""The environment of a walk: the graphs under construction, and what every TorchScript value stands for.

A list is kept as a Python list as long as its length is known. One that a region changes has to become a node first:
`NeedsNode` unwinds to the frame where the list was made, which makes the node and walks the region again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.frontends.fx_graph import source_line
from ir_tools.frontends.normalizer import Normalizer
from ir_tools.frontends.torchscript.values import ARGUMENT, ATTRIBUTE, Container, NeedsNode, ObjectValue, Uninitialized
from ir_tools.ir import Draft, Record, facts
from ir_tools.ir.host import inner_types, make_dict, make_list, make_tuple, set_value_type, value_type

aten = torch.ops.aten


@dataclass
class Frame:
    """A graph under construction: the root's, or that of a region's body, with what it uses from outside."""

    draft: Draft
    normalizer: Normalizer
    operands: dict[fx.Node, fx.Node] = field(default_factory=dict)  # outer node -> placeholder here

    @classmethod
    def over(cls, draft: Draft) -> Frame:
        return cls(draft, Normalizer(draft))

    def operand(self, outer: fx.Node) -> fx.Node:
        """The value of the next outer graph as one of this body."""
        if outer.op == "get_attr":
            return self.draft.get(str(outer.target))
        if outer not in self.operands:
            self.operands[outer] = self.draft.operand(outer.name, facts.fact(outer), value_type(outer))
        return self.operands[outer]


class Environment:
    """What a walk over one ScriptModule's `forward` knows. `prefix` is cut from module paths."""

    def __init__(self, draft: Draft, prefix: str = ""):
        self.prefix = prefix
        self.frames = [Frame.over(draft)]
        self.values: dict[str, Any] = {}
        self.containers: dict[int, Container] = {}
        self.literals: set[int] = set()  # the storages of tensors that the graph itself holds
        self.entered: set[int] = set()  # of known tensors that have become constants
        self.region_count = 0

    @property
    def draft(self) -> Draft:
        return self.frames[-1].draft

    @property
    def normalizer(self) -> Normalizer:
        return self.frames[-1].normalizer

    def mark_arguments(self, value: Any) -> None:
        """Lists and dicts among the arguments belong to the caller."""
        if isinstance(value, (list, dict)):
            self.containers[id(value)] = Container(value, ARGUMENT, "")
        if isinstance(value, (list, tuple, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                self.mark_arguments(part)

    @contextmanager
    def new_frame(self, name: str) -> Iterator[Frame]:
        """A body under construction, over the tables of the graph around it."""
        frame = Frame.over(Draft.inside(self.draft, name))
        with self.inside(frame):
            yield frame

    @contextmanager
    def inside(self, frame: Frame) -> Iterator[None]:
        self.frames.append(frame)
        try:
            yield
        finally:
            self.frames.pop()

    # -- values --------------------------------------------------------------------------------------------------------

    def bind(self, value: Any, result: Any) -> None:
        """Let a TorchScript value stand for a result."""
        if isinstance(result, (list, dict)) and id(result) not in self.containers:
            annotation = value.type().annotation_str
            self.containers[id(result)] = Container(result, len(self.frames) - 1, annotation)
        self.values[value.debugName()] = result

    def value(self, value: Any) -> Any:
        """What a TorchScript value stands for; a node as one of the graph under construction."""
        return self.here(self.values[value.debugName()])

    def here(self, value: Any) -> Any:
        if not isinstance(value, fx.Node) or value.graph is self.draft.graph:
            return value
        depth = next(i for i, frame in enumerate(self.frames) if frame.draft.graph is value.graph)
        for frame in self.frames[depth + 1 :]:
            value = frame.operand(value)
        return value

    def all_here(self, value: Any) -> Any:
        """`here` for every node in a structure of Python values."""
        if len(self.frames) == 1:
            return value
        if isinstance(value, (list, tuple)):
            return type(value)(self.all_here(v) for v in value)
        if isinstance(value, dict):
            return {k: self.all_here(v) for k, v in value.items()}
        return self.here(value)

    def is_local(self, value: Any) -> bool:
        """A value that exists only inside the region just walked."""
        if isinstance(value, fx.Node):
            return all(frame.draft.graph is not value.graph for frame in self.frames)
        if isinstance(value, (list, dict)):
            known = self.containers.get(id(value))
            return known is None or known.depth > len(self.frames) - 1
        return isinstance(value, torch.Tensor)

    # -- containers ----------------------------------------------------------------------------------------------------

    def changes(self, container: Any) -> None:
        """To be called before a Python container is changed: a region may not change one that it did not make."""
        known = self.containers.get(id(container))
        if known is not None and known.depth == ATTRIBUTE:
            raise CaptureError("forward changes a list or dict that is an attribute, which is not supported; use a buffer")
        if known is not None and known.depth == ARGUMENT:
            raise CaptureError("forward changes a list or dict that it is given, which is not supported; return a new one")
        if known is not None and known.depth < len(self.frames) - 1:
            raise NeedsNode(container)

    def made_node(self, container: Any) -> fx.Node:
        """Turn a container of this frame into a node, wherever it is referred to."""
        self.changes(container)
        known = self.containers.pop(id(container))
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

        for name, value in self.values.items():
            if isinstance(value, (list, dict, tuple, ObjectValue)):
                self.values[name] = replaced(value)
        return node

    def as_node(self, value: Any, annotation: str) -> fx.Node:
        """A Python value as a node of that TorchScript type in the graph under construction."""
        value = self.here(value)
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, torch.Tensor):
            # A copy, because the model may write into it at run time. `functionalize` drops what is not needed.
            return self.draft.call(aten.clone.default, self.draft.constant("constant", value))
        if isinstance(value, (list, dict)) and id(value) in self.containers:
            return self.made_node(value)  # a node is another object: no reference to the old one may be kept
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
            raise CaptureError(f"a {type(value).__name__} cannot be a runtime value")
        set_value_type(node, annotation)
        return node

    def as_argument(self, value: Any, annotation: str) -> Any:
        """`as_node`, but numbers, strings, devices and None as they are."""
        if value is None or isinstance(value, (bool, int, float, complex, str, torch.device, Uninitialized)):
            return value
        return self.as_node(value, annotation)

    def copied(self, value: Any, copies: dict[int, Any]) -> Any:
        """A structure with new lists and dicts, made by this frame; what was one object stays one."""
        if isinstance(value, tuple):
            return type(value)(self.copied(v, copies) for v in value)
        if not isinstance(value, (list, dict, ObjectValue)):
            return value
        if id(value) not in copies:
            copy: Any = ObjectValue(len(self.frames) - 1) if isinstance(value, ObjectValue) else type(value)()
            copies[id(value)] = copy
            known = self.containers.get(id(value))
            if known is not None:
                self.containers[id(copy)] = Container(copy, len(self.frames) - 1, known.annotation)
            if isinstance(value, ObjectValue):
                copy.attributes = {k: self.copied(v, copies) for k, v in value.attributes.items()}
            elif isinstance(value, dict):
                copy.update((k, self.copied(v, copies)) for k, v in value.items())
            else:
                copy.extend(self.copied(v, copies) for v in value)
        return copies[id(value)]

    # -- origins -------------------------------------------------------------------------------------------------------

    def origin(self, node: Any, arguments: list[Any]) -> Record:
        scope = node.scopeName().rsplit("/", 1)[-1].removeprefix("__module.")
        path = self.without_prefix(scope)
        if not path:
            constants = [a for a in arguments if isinstance(a, fx.Node) and a.op == "get_attr"]
            path = str(constants[0].target).rpartition(".")[0] if constants else ""
        return Record(path, source_line(node.sourceRange()))

    def without_prefix(self, path: str) -> str:
        return "" if path == self.prefix.rstrip(".") else path.removeprefix(self.prefix)
