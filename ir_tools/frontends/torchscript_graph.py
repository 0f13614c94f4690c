"""A walk over a TorchScript graph, traced or scripted: everything known now is computed, the rest becomes nodes.

The walk interprets the graph in order. A TorchScript value is one of: a Python value known now (numbers, strings, lists,
dicts, small tensors made of numbers), an fx node (a tensor of the run), a `ModuleValue`, or an `Unknown` (a number that
depends on tensor data). Sizes are known from the example inputs, so loops over sizes unroll and Ifs on them are resolved. An
If on an `Unknown` is kept as an assertion when one side only raises; any other control flow on data is refused with its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ir_tools.errors import first_line
from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.fx_graph import source_line
from ir_tools.frontends.normalize import Normalizer
from ir_tools.ir import Draft, Origin, facts
from ir_tools.ir.dialect import DTYPE_NUMBERS, getitem, spell_arguments, written_arguments, written_nodes

aten = torch.ops.aten
LONGEST_LOOP = 10_000
NOT_YET = "data-dependent control flow is not supported yet"
_NUMBER_OF_DTYPE = {dtype: number for number, dtype in DTYPE_NUMBERS.items()}


@dataclass(frozen=True)
class ModuleValue:
    """A submodule: its TorchScript object and its path from the root."""

    module: Any
    path: str


@dataclass(frozen=True)
class Unknown:
    """A Python number that depends on tensor data; `node` is the one-element tensor that holds it."""

    node: fx.Node


class Raised(Exception):
    """The graph raises, whatever the inputs are."""


class GraphWalk:
    """Walks one ScriptModule's `forward`, adding nodes to a draft. `prefix` is cut from module paths."""

    def __init__(self, draft: Draft, prefix: str = ""):
        self.draft = draft
        self.prefix = prefix
        self.normalizer = Normalizer(draft)
        self.env: dict[str, Any] = {}
        self._literals: set[int] = set()  # the storages of tensors that the graph itself holds

    def run(self, scripted: torch.jit.ScriptModule, arguments: list[Any]) -> Any:
        """The value that `forward` returns on `arguments` (nodes and Python values), as a Python structure."""
        graph = scripted.inlined_graph
        inputs = list(graph.inputs())
        if len(inputs) != len(arguments) + 1:
            raise CaptureError(f"forward takes {len(inputs) - 1} arguments, {len(arguments)} are known")
        self.env[inputs[0].debugName()] = ModuleValue(scripted, "")
        for value, given in zip(inputs[1:], arguments, strict=True):
            self.env[value.debugName()] = given
        try:
            self._block(graph)
        except Raised as error:
            raise CaptureError(f"the model raises for these inputs: {error}") from None
        results = [self.env[v.debugName()] for v in graph.outputs()]
        return results[0] if len(results) == 1 else tuple(results)

    # -- blocks and control flow --------------------------------------------------------------------------------------

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
        arguments = [self.env[v.debugName()] for v in node.inputs()]
        handler = _HANDLERS.get(kind)
        with self.draft.origin(self._origin(node, arguments)):
            try:
                if handler is not None:
                    result = handler(self, node, arguments)
                    if result is not NotImplemented:
                        self._set(node, result)
                        return
                self._set(node, self._operator(node, arguments))
            except (Raised, CaptureError):
                raise
            except Exception as error:
                raise CaptureError(f"{kind}{where(node)}: {first_line(error)}") from error

    def _set(self, node: Any, result: Any) -> None:
        outputs = list(node.outputs())
        if len(outputs) == 1:
            self.env[outputs[0].debugName()] = result
        elif outputs:
            for value, part in zip(outputs, result, strict=True):
                self.env[value.debugName()] = part

    def _if(self, node: Any) -> None:
        condition = self.env[next(iter(node.inputs())).debugName()]
        then, orelse = node.blocks()
        if isinstance(condition, Unknown):
            taken = self._assertion(node, condition, then, orelse)
        else:
            taken = then if condition else orelse
        self._block(taken)
        for value, result in zip(node.outputs(), taken.outputs(), strict=True):
            self.env[value.debugName()] = self.env[result.debugName()]

    def _assertion(self, node: Any, condition: Unknown, then: Any, orelse: Any) -> Any:
        """Keep `if c: raise` as an assertion; return the block that goes on."""
        for raising, other, expected in ((then, orelse, False), (orelse, then, True)):
            if _only_raises(raising):
                holds = condition.node if expected else self.draft.call(aten.logical_not.default, condition.node)
                message = _raise_message(self, raising) or "an assertion of the model failed"
                self.draft.call(aten._assert_async.msg, holds, message)
                return other
        raise CaptureError(f"the model branches on tensor data{where(node)}; {NOT_YET}")

    def _loop(self, node: Any) -> None:
        trip_count, condition, *carried = (self.env[v.debugName()] for v in node.inputs())
        (body,) = node.blocks()
        iteration, *body_inputs = body.inputs()
        count = 0
        while True:
            if isinstance(condition, Unknown) or isinstance(trip_count, Unknown):
                raise CaptureError(f"the model loops on tensor data{where(node)}; {NOT_YET}")
            if not condition or count >= trip_count:
                break
            if count == LONGEST_LOOP:
                raise CaptureError(f"a loop runs more than {LONGEST_LOOP} times{where(node)}")
            self.env[iteration.debugName()] = count
            for value, part in zip(body_inputs, carried, strict=True):
                self.env[value.debugName()] = part
            self._block(body)
            condition, *carried = (self.env[v.debugName()] for v in body.outputs())
            count += 1
        for value, part in zip(node.outputs(), carried, strict=True):
            self.env[value.debugName()] = part

    # -- operators ----------------------------------------------------------------------------------------------------

    def _operator(self, node: Any, arguments: list[Any]) -> Any:
        overload = _overload(node.schema(), node.kind(), where(node))
        names = [(a.name, a.kwarg_only) for a in overload._schema.arguments]
        positional = [v for v, (_, keyword) in zip(arguments, names, strict=True) if not keyword]
        keywords = {name: v for v, (name, keyword) in zip(arguments, names, strict=True) if keyword}
        if _holds(arguments, Unknown):
            return self._on_unknown(node, overload, arguments)
        for written in written_arguments(overload):
            value = arguments[[name for name, _ in names].index(written)]
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self._literals:
                # Tracing has written already, so that the value held is no longer the one to start from.
                raise CaptureError(f"the model writes into a tensor that is no buffer{where(node)}; make it a buffer")
        if _holds(arguments, fx.Node) or _makes_a_tensor(overload):
            if not _holds(arguments, fx.Node) and _holds(arguments, torch.Tensor) and _is_small(arguments):
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

    def _results(self, overload: OpOverload, value: Any) -> Any:
        """A node with several results as a Python list of them."""
        known = facts.fact(value) if isinstance(value, fx.Node) else None
        if isinstance(known, (tuple, list)):
            parts = [self.draft.call(getitem, value, i) for i in range(len(known))]
            return parts if isinstance(known, list) and len(overload._schema.returns) == 1 else tuple(parts)
        return value

    def _on_unknown(self, node: Any, overload: OpOverload, arguments: list[Any]) -> Any:
        """Logic on numbers that depend on data, done on one-element tensors."""
        name = overload._schema.name
        tensor_op = _LOGIC.get(name)
        if tensor_op is None:
            raise CaptureError(
                f"{name} needs the value of a tensor at capture{where(node)}; data-dependent numbers are not supported yet"
            )
        return Unknown(self.normalizer.call(tensor_op, *(a.node if isinstance(a, Unknown) else a for a in arguments)))

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

    def _known(self, value: Any, path: str) -> Any:
        """A constant or attribute of the module: its tensors become constants, containers stay containers."""
        if isinstance(value, torch.Tensor):
            # A weight packed for oneDNN is opaque; its plain form is exact.
            return self.draft.constant(path, value.to_dense() if value.is_mkldnn else value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._known(v, f"{path}.{i}") for i, v in enumerate(value))
        if isinstance(value, dict):
            return {k: self._known(v, f"{path}.{k}") for k, v in value.items()}
        return _NUMBER_OF_DTYPE[value] if isinstance(value, torch.dtype) else value


def flat_values(value: Any) -> list[Any]:
    """The tensors in a returned structure, in pytree order."""
    if isinstance(value, (fx.Node, torch.Tensor)):
        return [value]
    if isinstance(value, dict):
        return [v for part in value.values() for v in flat_values(part)]
    if isinstance(value, (list, tuple)):
        return [v for part in value for v in flat_values(part)]
    return []


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


def _only_raises(block: Any) -> bool:
    nodes = list(block.nodes())
    return any(n.kind() == "prim::RaiseException" for n in nodes) and not any(
        n.kind() in ("prim::If", "prim::Loop", "prim::SetAttr") for n in nodes
    )


def _raise_message(walk: GraphWalk, block: Any) -> str:
    """The message of a raise, when it is a plain string."""
    for node in block.nodes():
        if node.kind() == "prim::RaiseException":
            value = next(iter(node.inputs()))
            made_by = value.node()
            if made_by.kind() == "prim::Constant":
                return str(value.toIValue())
            known = walk.env.get(value.debugName())
            return known if isinstance(known, str) else ""
    return ""


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
    return a[0][0] if node.outputsSize() == 1 else a[0]


@_handles("prim::TupleIndex")
def _tuple_index(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0][a[1]]


@_handles("prim::TupleSlice")
def _tuple_slice(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0][node.i("beg") : node.i("end")]


@_handles("prim::RaiseException")
def _raise(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise Raised(f"{a[0]}{where(node)}")


@_handles("prim::Uninitialized")
def _uninitialized(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return None


@_handles("prim::unchecked_cast", "prim::unchecked_unwrap_optional", "aten::_unwrap_optional", "prim::rangelist_identity")
def _same(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0]


@_handles("prim::Print", "aten::warn")
def _nothing(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return ()


@_handles("prim::NumToTensor")
def _num_to_tensor(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return a[0].node if isinstance(a[0], Unknown) else torch.tensor(a[0])


_NUMBER_DTYPES = {"Int": torch.int64, "IntImplicit": torch.int64, "Float": torch.float64, "FloatImplicit": torch.float64}


@_handles("aten::tensor", "aten::as_tensor", "aten::scalar_tensor")
def _tensor(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if _holds(a, fx.Node) or _holds(a, Unknown):
        if isinstance(a[0], fx.Node) and node.kind() == "aten::as_tensor":
            wanted = DTYPE_NUMBERS[a[1]] if a[1] is not None else facts.dtype(a[0])
            return a[0] if wanted is facts.dtype(a[0]) else walk.draft.call(aten.to.dtype, a[0], wanted)
        raise CaptureError(f"a tensor is made from values that depend on data{where(node)}")
    dtype = DTYPE_NUMBERS[a[1]] if len(a) > 1 and a[1] is not None else None
    return torch.as_tensor(a[0], dtype=dtype) if isinstance(a[0], torch.Tensor) else torch.tensor(a[0], dtype=dtype)


@_handles("aten::Int", "aten::Float", "aten::Bool", "aten::item", "aten::IntImplicit", "aten::FloatImplicit",
          "aten::ScalarImplicit", "prim::ImplicitTensorToNum")  # fmt: skip
def _number(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    convert = {"Int": int, "IntImplicit": int, "Float": float, "FloatImplicit": float, "Bool": bool}
    name = node.kind().split("::")[1]
    value = a[0]
    if isinstance(value, fx.Node):
        if name == "Bool" and facts.dtype(value) is not torch.bool:
            value = walk.normalizer.call(aten.ne.Scalar, value, 0)
        elif name in _NUMBER_DTYPES and facts.dtype(value) is not _NUMBER_DTYPES[name]:
            value = walk.draft.call(aten.to.dtype, value, _NUMBER_DTYPES[name])
        return Unknown(value)
    if isinstance(value, Unknown):
        if name in _NUMBER_DTYPES and facts.dtype(value.node) is not _NUMBER_DTYPES[name]:
            return Unknown(walk.draft.call(aten.to.dtype, value.node, _NUMBER_DTYPES[name]))
        return value
    if isinstance(value, torch.Tensor):
        value = value.item()
    return convert[name](value) if name in convert else value


@_handles("aten::size", "aten::sym_size")
def _size(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    shape = list(walk_shape(node, a[0]))
    return shape if len(a) == 1 else shape[a[1]]


@_handles("aten::dim")
def _dim(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return len(walk_shape(node, a[0]))


@_handles("aten::numel")
def _numel(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return torch.Size(walk_shape(node, a[0])).numel()


@_handles("aten::stride")
def _stride(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"the model reads strides{where(node)}, which a compiler that may change layouts cannot keep")


def walk_shape(node: Any, value: Any) -> tuple[int, ...]:
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else facts.shape(value)
    if shape is None:
        raise CaptureError(f"a size is not known at capture{where(node)}; give example_inputs")
    return shape


@_handles("prim::dtype", "prim::device", "prim::layout", "prim::is_cuda", "prim::is_cpu", "prim::requires_grad",
          "prim::is_quantized", "prim::is_mkldnn", "prim::is_sparse", "prim::is_mps", "prim::is_meta", "prim::is_xla",
          "prim::is_nested", "aten::is_floating_point", "aten::is_complex")  # fmt: skip
def _tensor_fact(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    known = a[0] if isinstance(a[0], torch.Tensor) else facts.fact(a[0])
    if not isinstance(known, torch.Tensor):
        raise CaptureError(f"a fact of a tensor is not known at capture{where(node)}; give example_inputs")
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
    same = a[0] is a[1]
    return same if node.kind() == "aten::__is__" else not same


@_handles("prim::isinstance", "prim::HasAttr")
def _unsupported(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    raise CaptureError(f"{node.kind()}{where(node)} is not supported")


def _on_container(function: Callable[..., Any]) -> Handler:
    """A handler that acts when its first argument is a Python container or string, and leaves tensors to the operator."""

    def handler(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
        return function(*a) if isinstance(a[0], (list, tuple, dict, str)) else NotImplemented

    return handler


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


_HANDLERS.update({
    "aten::__getitem__": _on_container(lambda c, key: c[key]),
    "aten::_set_item": _on_container(_set_item),
    "aten::Delete": _on_container(_delete),
    "aten::append": _on_container(_in_place("append")),
    "aten::extend": _on_container(_in_place("extend")),
    "aten::insert": _on_container(_in_place("insert")),
    "aten::reverse": _on_container(_in_place("reverse")),
    "aten::clear": _on_container(_in_place("clear")),
    "aten::pop": _on_container(lambda c, *a: c.pop(*a)),
    "aten::copy": _on_container(lambda c: c.copy()),
    "aten::list": _on_container(list),
    "aten::keys": _on_container(lambda c: list(c)),
    "aten::values": _on_container(lambda c: list(c.values())),
    "aten::items": _on_container(lambda c: list(c.items())),
    "aten::get": _on_container(lambda c, *a: c.get(*a)),
    "aten::update": _on_container(_in_place("update")),
    "aten::__contains__": _on_container(lambda c, key: key in c),
    "aten::slice": _on_container(lambda c, start, end, step: c[start:end:step]),
    "aten::eq": _on_container(lambda x, y: x == y),
    "aten::ne": _on_container(lambda x, y: x != y),
    "aten::add": _on_container(lambda x, y: x + y),
    "aten::add_": _on_container(_in_place("extend")),
    "aten::mul": _on_container(lambda x, n: x * n),
    "aten::format": _on_container(lambda text, *a: text.format(*a)),
    "aten::join": _on_container(lambda text, parts: text.join(parts)),
})  # fmt: skip


@_handles("aten::len")
def _length(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return len(a[0]) if isinstance(a[0], (list, tuple, dict, str)) else walk_shape(node, a[0])[0]


_LOGIC = {
    "aten::__not__": aten.logical_not.default,
    "aten::__and__": aten.logical_and.default,
    "aten::__or__": aten.logical_or.default,
    "aten::eq": aten.eq.Scalar,
    "aten::ne": aten.ne.Scalar,
    "aten::lt": aten.lt.Scalar,
    "aten::le": aten.le.Scalar,
    "aten::gt": aten.gt.Scalar,
    "aten::ge": aten.ge.Scalar,
}

