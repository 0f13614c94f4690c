"""What the kinds of nodes in a TorchScript graph mean on values that are known at capture.

A handler takes the walk, the TorchScript node and its arguments, and gives the result; `NotImplemented` leaves the node to
the operator of its schema, which becomes an op of the Program.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ir_tools.frontends.errors import CaptureError
from ir_tools.frontends.torchscript_values import (
    NUMBER_OF_DTYPE,
    UNINITIALIZED,
    ObjectValue,
    Raised,
    TextOfData,
    holds,
    where,
)
from ir_tools.ir import Draft, facts
from ir_tools.ir.dialect import DTYPE_NUMBERS, getitem, written_nodes
from ir_tools.ir.host import TENSOR, inner_types, pop_first_item, set_value_type, value_type
from ir_tools.torch_compat import pytree

if TYPE_CHECKING:
    from ir_tools.frontends.torchscript_graph import GraphWalk

aten = torch.ops.aten

# -- handlers: what a kind of node means, on Python values ------------------------------------------------------------------

Handler = Callable[["GraphWalk", Any, list[Any]], Any]
HANDLERS: dict[str, Handler] = {}


def _handles(*kinds: str) -> Callable[[Handler], Handler]:
    def register(function: Handler) -> Handler:
        for kind in kinds:
            HANDLERS[kind] = function
        return function

    return register


@_handles("prim::GetAttr")
def _get_attr(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], ObjectValue):
        return a[0].attributes[node.s("name")]
    return walk.get_attribute(a[0], node.s("name"))


@_handles("prim::CreateObject")
def _create_object(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return ObjectValue(len(walk.frames) - 1)


@_handles("prim::SetAttr")
def _set_attr(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    """`self.n += 1` writes in place and then sets the attribute to itself; anything else rebinds, and is refused."""
    if isinstance(a[0], ObjectValue):
        if a[0].depth < len(walk.frames) - 1:
            raise CaptureError(f"a branch or loop on data sets an attribute of an object{where(node)}, which is not supported")
        a[0].attributes[node.s("name")] = a[1]
        return ()
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
        parts = [part_of(walk, parts, i, v.type().annotation_str) for i, v in enumerate(node.outputs())]
    return parts[0] if node.outputsSize() == 1 else parts


def part_of(walk: GraphWalk, container: fx.Node, index: int, annotation: str) -> fx.Node:
    """A part of a tuple or list of the run."""
    part = walk.draft.call(getitem, container, index)
    set_value_type(part, annotation)
    return part


@_handles("prim::TupleIndex")
def _tuple_index(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if isinstance(a[0], fx.Node):
        return part_of(walk, a[0], a[1], next(iter(node.outputs())).type().annotation_str)
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
    if holds(a[0], fx.Node):
        if isinstance(a[0], fx.Node) and value_type(a[0]) == TENSOR and node.kind() == "aten::as_tensor":
            wanted = dtype or facts.dtype(a[0])
            return a[0] if wanted is facts.dtype(a[0]) else walk.draft.call(aten.to.dtype, a[0], wanted)
        return _as_tensor(walk, walk.all_here(a[0]), dtype)
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
    if len(a) == 1:
        return [walk.draft.size(a[0], axis) for axis in range(rank)]
    return walk.draft.size(a[0], a[1] % rank if rank else a[1])


@_handles("aten::_shape_as_tensor")
def _shape_as_tensor(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    """The sizes as a tensor of ints: how tracing into ONNX-ready code reads them."""
    rank = facts.rank(a[0])
    if rank is None:
        return NotImplemented
    sizes = [walk.draft.size(a[0], axis) for axis in range(rank)]
    return _as_tensor(walk, sizes, torch.int64) if holds(sizes, fx.Node) else torch.tensor(sizes)


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
        return NUMBER_OF_DTYPE[known.dtype]
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


@_handles("aten::str")
def _text(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    return TextOfData("<value>") if isinstance(a[0], fx.Node) else str(a[0])


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
        if node.kind() in _BY_VALUE and isinstance(a[0], list) and holds(a, fx.Node):
            return NotImplemented
        if changes:
            walk.changes(a[0])
        return function(*a)

    return handler


_BY_KEY = frozenset(
    "aten::__getitem__ aten::_set_item aten::Delete aten::__contains__ aten::setdefault aten::mul aten::mul_".split()
)
"""With a key or count of the run, even a container that is known is read or changed by the run."""
_BY_VALUE = frozenset("aten::__contains__ aten::remove aten::sort".split())
"""So is a list with values of the run in it, where they are compared."""


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
        return walk.operator(node, [walk.made_node(a[0]), a[1]])
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
    if holds(a, fx.Node):
        return NotImplemented
    return (one == other) is (node.kind() == "aten::eq")


@_handles("aten::format")
def _format(walk: GraphWalk, node: Any, a: list[Any]) -> Any:
    if any(isinstance(v, (fx.Node, TextOfData)) for v in a):
        return TextOfData(a[0].format(*("<value>" if isinstance(v, fx.Node) else v for v in a[1:])))
    return a[0].format(*a[1:])


TAKES_TEXT = frozenset({"prim::RaiseException", "prim::Print", "aten::warn", "aten::format", "aten::add", "aten::join"})

HANDLERS.update({
    "aten::__getitem__": _on_container(lambda c, key: c[key]),
    "aten::_set_item": _on_container(_set_item, changes=True),
    "aten::Delete": _on_container(_delete, changes=True),
    "aten::append": _on_container(_in_place("append"), changes=True),
    "aten::insert": _on_container(_in_place("insert"), changes=True),
    "aten::reverse": _on_container(_in_place("reverse"), changes=True),
    "aten::clear": _on_container(_in_place("clear"), changes=True),
    "aten::pop": _on_container(lambda c, *a: c.pop(*a), changes=True),
    "aten::remove": _on_container(_in_place("remove"), changes=True),
    "aten::sort": _on_container(lambda c, reverse=False: c.sort(reverse=reverse), changes=True),
    "aten::popitem": _on_container(pop_first_item, changes=True),
    "aten::setdefault": _on_container(lambda c, *a: c.setdefault(*a), changes=True),
    "aten::mul_": _on_container(operator.imul, changes=True),
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
    return walk.draft.size(a[0], 0) if value_type(a[0]) == TENSOR and facts.rank(a[0]) else NotImplemented


# -- what forward returns -----------------------------------------------------------------------------------------------


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
