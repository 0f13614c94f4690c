"""Make tensors on the device of an input where the model did so, so that the file moves between devices.

    zeros(size, device=cpu)          ->  new_zeros(x, size)          x: an input; likewise ones, full, empty
    arange(n, device=cpu)            ->  to(arange(n, device=cpu), new_empty(x, [0], dtype))       and every other factory

Capture bakes devices in. Which factories take theirs from the inputs was found by running the model
(`ir_tools.frontends.portability`). The others stay, as do those in branches and loops, and a note names each: the file cannot
move to another device. What was folded into a constant moves with the file as it is. Numbers, shapes and dtypes are the same.
"""

from typing import Any

import torch

from ir_tools.ir import Block, Draft, Program, facts
from ir_tools.ir.dialect import aten, bound_arguments, short_name
from ir_tools.ir.provenance import location, record
from ir_tools.rewrite import RewriteLog, graph_pass
from ir_tools.rewrite.notes import Notes
from ir_tools.verify.device_placement import DevicePlacement, Factories, names_a_device

FOLLOWS, FIXED = DevicePlacement.FOLLOWS, DevicePlacement.FIXED

NEW = {
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
    aten.full.default: aten.new_full.default,
    aten.empty.memory_format: aten.new_empty.default,
}


@graph_pass(effects=())
def follow_inputs(program: Block, log: RewriteLog, factories: Factories) -> tuple[Block, Notes]:
    draft = Draft.of(program)
    anchor = anchor_of(draft.program)
    notes = Notes()
    for node in filter(names_a_device, draft.program.calls):
        site = f"follow_inputs@{node.name}"
        if not log.allows(site):
            continue
        why_not = objection(program, node, factories, anchor)
        if why_not:
            log.refused(site, "follow_inputs", location(node), why_not, expected=True)  # the note says it
            at = record(node).source
            notes += Notes((f"{at}: {why_not}" if at else why_not,))
            continue
        with draft.before(node, "follow_inputs"):
            new = following(draft, node, anchor)
        draft.redirect(node, new)
        log.rewrote(site, "follow_inputs", location(node))
    return draft.finish(), notes


def objection(program: Block, node: Any, factories: Factories, anchor: Any) -> str:
    """Why a factory stays where it is, "" where it follows the inputs."""
    op = short_name(node.target)
    what = f"{op} makes a tensor on {facts.device(node)}"
    if not isinstance(program, Program):
        return f"{what} in a branch or loop, where it does not follow the inputs: keep the file on that device"
    placement = factories.placement(record(node).source, op)
    if placement is FOLLOWS and anchor is not None:
        return ""
    if placement is FIXED:
        return f"{what} whatever the inputs' device: the file cannot move to another device"
    why = f" ({factories.unknown})" if factories.unknown else ""
    return f"{what}, and whether that follows the inputs is not known{why}: keep the file on that device"


def anchor_of(program: Block) -> Any:
    """A value that is where the inputs are: an input, else a constant."""
    candidates = program.placeholders or program.graph.find_nodes(op="get_attr")
    return next((n for n in candidates if getattr(facts.tensor(n), "layout", None) is torch.strided), None)


def following(draft: Draft, node: Any, anchor: Any) -> Any:
    """The tensor of a factory on the device of `anchor`."""
    dtype = facts.dtype(node)
    arguments = bound_arguments(node)
    plain = not arguments.get("pin_memory") and arguments.get("layout") in (None, torch.strided)
    if node.target in NEW and plain and arguments.get("memory_format") is None:
        sizes = [arguments[name] for name in ("size", "fill_value") if name in arguments]
        return draft.call(NEW[node.target], anchor, *sizes, dtype=dtype)
    where = draft.call(aten.new_empty.default, anchor, [0], dtype=dtype)
    made = draft.call(node.target, *node.args, **node.kwargs)
    return draft.call(aten.to.other, made, where)
