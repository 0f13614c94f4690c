"""The end of every capture: in-place ops become pure ops, and views reshapes, where the difference is unobservable.

    relu_(x), add_(x, y), ...                      ->  relu(x), add(x, y)
    view, _unsafe_view                             ->  reshape          (where no op writes into the value)
    contiguous(x), clone(constant)                 ->  the value itself (where nothing changes)
    writes into memory that is never read          ->  nothing

A constant that a remaining op writes into becomes state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ir_tools.errors import CaptureError
from ir_tools.ir import Draft, alias_analysis, facts, shape_inference
from ir_tools.ir.dialect import bound_arguments, getitem, op_name, short_name
from ir_tools.ir.effects import acts, aliased_nodes, changed_containers, has_effect, written_arguments, written_nodes
from ir_tools.ir.program import Program
from ir_tools.ir.provenance import location
from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten


def functionalize(draft: Draft) -> None:
    """Replace in-place ops by pure ones where that is unobservable, views by reshapes, and register written constants as state.

    `op_(t, ...)` may become `t' = op(t, ...)` when t's storage belongs to the graph (no input, no constant), and no other
    value that may share it and was made before is read afterwards. Later users of `t` use `t'`.
    """
    graph = draft.graph
    order = {node: i for i, node in enumerate(graph.nodes)}
    sharing: dict[fx.Node, list[fx.Node]] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and written_nodes(node):
            node = _functionalized(draft, node, sharing, order) or node
        group = [node]
        for other in aliased_nodes(node):
            others = sharing[other]
            if others is group:
                continue
            small, group = sorted((group, others), key=len)
            group.extend(small)
            for member in small:
                sharing[member] = group
        sharing[node] = group
    _drop_unread_writes(draft)
    memory = alias_analysis.Memory(graph)
    written = alias_analysis.mutated_values(graph)
    for name in memory.written_constants(graph):
        if name == "constant" or name.startswith("constant@"):
            raise CaptureError("the model writes into a tensor that is no buffer; make it a buffer")
        sharing_it = names_of_its_memory(draft.program, name)
        if sharing_it:
            raise CaptureError(
                f"the model writes into {name}, whose memory is that of {', '.join(sharing_it)} too, and a file would keep "
                "them apart. Give each memory of its own, or make them one buffer"
            )
        draft.program.state |= {name}
    # Values that others may write into after the body has ended are not safe either.
    mutated = written if isinstance(draft.program, Program) else written | memory.reachable(graph)
    for node in list(graph.nodes):
        if node in written and op_name(node.target) in LAYOUT_DECIDES:
            if any(member.op == "placeholder" for member in sharing[node]):
                if op_name(node.target) == "aten::flatten":
                    continue
                raise CaptureError(
                    f"the model writes into a value that is, or is not, its input: {short_name(node.target)} at "
                    f"{location(node)} copies or not by the input's memory layout"
                )
            _say_whether_it_copies(draft, node)
        elif node.op == "call_function" and _changes_nothing(node, mutated):
            draft.redirect(node, node.args[0])
        elif node.op == "call_function" and op_name(node.target) in ("aten::view", "aten::_unsafe_view"):
            known = facts.shape(node)
            if node in written or known is None or len(node.args) != 2:
                continue
            if not isinstance(node.args[1], list):  # view.dtype reads the bits anew
                continue
            sizes = list(known) if all(isinstance(size, int) for size in known) else node.args[1]
            with draft.before(node):
                draft.redirect(node, draft.call(aten.reshape.default, node.args[0], sizes))


def _drop_unread_writes(draft: Draft) -> None:
    """Remove writes into memory of the graph's own that neither an output nor an effect reads, with what they alone need."""
    classes = alias_analysis.storage_classes(draft.graph.nodes)
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in draft.graph.nodes:
        members.setdefault(classes[node], []).append(node)
    own = {root for root, group in members.items() if alias_analysis.is_own(group)}

    def only_writes_own(node: fx.Node) -> bool:
        does_more = acts(node) or bool(changed_containers(node))
        return bool(written_nodes(node)) and not does_more and all(classes[n] in own for n in written_nodes(node))

    writers: dict[fx.Node, list[fx.Node]] = {}  # a region, unlike an op in place, need not give back what it writes into
    for node in draft.graph.nodes:
        for target in written_nodes(node):
            writers.setdefault(classes[target], []).append(node)
    needed: set[fx.Node] = set()
    waiting = [node for node in draft.graph.nodes if has_effect(node) and not only_writes_own(node)]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
            # A read of memory needs every write into it.
            waiting += writers.get(classes[node], ())
    unneeded = [node for node in draft.graph.nodes if node.op == "call_function" and node not in needed]
    if any(written_nodes(node) for node in unneeded):
        for node in reversed(unneeded):
            draft.remove(node)


def names_of_its_memory(program: Any, name: str) -> list[str]:
    """Other constants whose storage is that of the constant `name`."""
    storage = program.constants[name].untyped_storage().data_ptr()
    others = {n: t for n, t in program.constants.items() if n != name and t.layout is torch.strided and t.numel()}
    return [n for n, t in others.items() if t.untyped_storage().data_ptr() == storage]


def _say_whether_it_copies(draft: Draft, node: fx.Node) -> None:
    """Replace an op that views or copies depending on layout by a view or by a copy: passes may change layouts."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or facts.tensor(node) is None or facts.tensor(source) is None:
        return
    sizes = facts.shape(node) or ()
    if op_name(node.target) != "aten::contiguous" and not all(isinstance(size, int) for size in sizes):
        return
    shares = shape_inference.shares_memory(draft.program.mode, node)
    if shares is None:
        raise CaptureError(
            f"the model writes into what {short_name(node.target)} at {location(node)} gives, which is a copy or not by the "
            "layout of a value that differs between branches or rounds"
        )
    copies = not shares
    with draft.before(node):
        new: Any = source
        if copies:
            kept = node.kwargs.get("memory_format", torch.contiguous_format)
            new = draft.call(aten.clone.default, source, memory_format=kept)
        if op_name(node.target) != "aten::contiguous":
            new = draft.call(aten.view.default, new, list(sizes))
        draft.redirect(node, new)


LAYOUT_DECIDES = frozenset({"aten::contiguous", "aten::reshape", "aten::flatten"})
"""Ops that copy or alias, depending on the memory layout of their operand."""


def _changes_nothing(node: fx.Node, mutated: frozenset[fx.Node]) -> bool:
    """A `contiguous` of what is contiguous, or a copy of a constant, where no op writes into either."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node in mutated or source in mutated:
        return False
    if op_name(node.target) == "aten::clone":
        return source.op == "get_attr" and not any(user.op == "output" for user in node.users)
    known = facts.tensor(source)
    if op_name(node.target) != "aten::contiguous" or known is None:
        return False
    return bool(facts.is_contiguous_in(known, bound_arguments(node)["memory_format"]))


def _functionalized(
    draft: Draft, writer: fx.Node, sharing: dict[fx.Node, list[fx.Node]], order: dict[fx.Node, int]
) -> fx.Node | None:
    """The pure node that replaced `writer`, None when it must stay."""
    pure = pure_overload(writer.target)
    target = writer.args[0]
    if pure is None or not isinstance(target, fx.Node) or facts.dtype(target) is None:
        return None
    now = order[writer]
    for member in sharing[target]:
        if not alias_analysis.is_own([member]):
            return None
        if member is not target and any(order[user] > now for user in member.users):
            return None
    moves_axes = torch.Tag.inplace_view in getattr(writer.target, "tags", ())
    if moves_axes and any(order[user] > now for user in target.users):
        raise CaptureError(f"{short_name(writer.target)} at {location(writer)} changes the shape of a value that is read again")
    if not all(isinstance(size, int) for size in facts.shape(target) or ()) and _broadcasts(writer, target):
        return None
    with draft.before(writer):
        new = draft.call(pure, *writer.args, **writer.kwargs)
        if not moves_axes and facts.shape(new) != facts.shape(target):
            new = draft.call(aten.expand.default, new, list(facts.shape(target) or ()))
        if facts.dtype(new) != facts.dtype(target):
            new = draft.call(aten.to.dtype, new, facts.dtype(target))
    for n in reversed(list(_back_to(writer, new))):
        order[n] = now
        sharing[n] = [n]
    for user in list(target.users):
        if order[user] > now:
            draft.redirect_in(user, target, new)
    draft.redirect(writer, new)
    draft.remove(writer)
    return new


def _broadcasts(writer: fx.Node, target: fx.Node) -> bool:
    """An operand of a writer has another shape than what it writes into, so that the pure result may have another one."""
    tensors = [n for n in writer.all_input_nodes if facts.tensor(n) is not None]
    return any(facts.shape(n) != facts.shape(target) for n in tensors)


def _back_to(writer: fx.Node, new: fx.Node) -> list[fx.Node]:
    """The nodes just inserted in front of `writer`, up to `new` (at most an op, an expand and a cast)."""
    inserted, node = [new], new.prev
    while node in new.all_input_nodes and node.op == "call_function" and node.next is inserted[-1] and len(inserted) < 3:
        inserted.append(node)
        node = node.prev
    return inserted


def pure_overload(target: Any) -> OpOverload | None:
    """`relu` for `relu_`, `add.Tensor` for `add_.Tensor`; None when there is no pure twin with the same arguments."""
    if target is getitem or not isinstance(target, OpOverload):
        return None
    name = short_name(target)
    if not name.endswith("_") or name.endswith("__") or written_arguments(target) != (schema_of(target).arguments[0].name,):
        return None
    packet = getattr(aten, name[:-1], None)
    overload = schema_of(target).overload_name or "default"
    if packet is None or overload not in packet.overloads():
        return None
    pure = getattr(packet, overload)
    same = [a.name for a in schema_of(pure).arguments] == [a.name for a in schema_of(target).arguments]
    return pure if same else None
