"""Device constants that capture baked in: those that the model took from its inputs follow them again, others are reported.

    zeros(size, device=cpu)          ->  new_zeros(x, size)          x: an input; likewise ones, full, empty
    arange(n, device=cpu)            ->  to(arange(n, device=cpu), new_empty(x, [0], dtype))       and every other factory

Whether a factory follows the inputs is found by running the model on wrapper tensors that claim to be on another device: a
factory that then asks for that device, or whose tensor is moved to it later, follows. (Dtypes need none of this: a file checks
those of its inputs.)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import fx
from torch.func import functional_call

from ir_tools.errors import first_line
from ir_tools.frontends.perturbed_inputs import perturbed
from ir_tools.frontends.python_frames import frames, location_of, users_frame
from ir_tools.frontends.source import Source
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.frontends.user_model import FlatModel
from ir_tools.frontends.wrapper_tensors import WrapperFunctions, WrapperMode, WrapperTensor, given, wrap_result, written
from ir_tools.ir import Draft, Program, facts
from ir_tools.ir.dialect import argument_names, bound_arguments, short_name
from ir_tools.ir.provenance import record
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.operators import OpOverload, schema_of

aten = torch.ops.aten

ELSEWHERE = torch.device("meta")
"""The device that wrapper tensors claim. Any but the inputs' would do; torch has no lazy start or missing guard here."""


class DevicePlacement(Enum):
    """Where a factory op puts its tensor."""

    FOLLOWS = "on the inputs' device"
    FIXED = "on a device that the source names, or the default one"
    UNKNOWN = "not known"


@dataclass(eq=False)
class Made:
    """One factory op of a run, in the order of execution. `location` is "file.py:12"."""

    location: str
    op: str
    device: torch.device
    moved: bool = False
    stayed: bool = False

    @property
    def placement(self) -> DevicePlacement:
        """A tensor made on a fixed device, all uses of which move it to the inputs', follows as well."""
        follows = self.device == ELSEWHERE or (self.moved and not self.stayed)
        return DevicePlacement.FOLLOWS if follows else DevicePlacement.FIXED


@dataclass
class Factories:
    """The factory ops of a model; `unknown` says why they could not be found."""

    made: list[Made] = field(default_factory=list)
    unknown: str = ""

    def placement(self, location: str, op: str) -> DevicePlacement:
        """The placement of a node of the captured graph, by its source line and the op's short name.

        Where no factory was seen at the line (the lines of an ExportedProgram's code are not those of its source), the op alone
        decides. If several factories match, they must agree.
        """
        at_line = [m for m in self.made if m.location == location]
        candidates = [m for m in at_line if m.op == op] or at_line or [m for m in self.made if m.op == op]
        placements = {m.placement for m in candidates}
        return placements.pop() if len(placements) == 1 else DevicePlacement.UNKNOWN


def factories_of(source: Source, tensors: Sequence[torch.Tensor] | None = None) -> Factories:
    """Run the model, its inputs and parameters elsewhere, and note where factory ops put their tensors.

    `tensors` are flat inputs; None stands for the first example.
    """
    tensors = source.tensors if tensors is None else tensors
    home = tensors[0].device if tensors else torch.device("cpu")
    mode = _Devices(home)
    flat = FlatModel(source.model, source.signature)
    try:
        inputs = tuple(WrapperTensor(t.clone(), ELSEWHERE) for t in tensors)
        own: dict[str, torch.Tensor] = {
            name: WrapperTensor(t.detach(), ELSEWHERE) for name, t in (*flat.named_parameters(), *flat.named_buffers())
        }
        with undisturbed(source.model), seeded(), mode, _Literals(home):
            for output in functional_call(flat, own, inputs):
                mode.stays(output)
    except Exception as error:  # whatever wrapper tensors cannot follow: then nothing is known
        return Factories(unknown=f"{type(error).__name__}: {first_line(error)}")
    return Factories(mode.made)


def _factories_behind(source: Source, wanted: Collection[tuple[str, str]]) -> Factories:
    """The factories of the example's run, and of runs on perturbed inputs while one of `wanted` is unknown.

    A captured graph may hold what the example's own run left out: models skip a mask of ones unless they are traced.
    """
    found = factories_of(source)
    for _, tensors in perturbed(source.tensors):
        if found.unknown or all(found.placement(*node) is not DevicePlacement.UNKNOWN for node in wanted):
            break
        found.made += factories_of(source, tensors).made
    return found


class _Devices(WrapperMode):
    """Gives each result the device that it would have were the inputs elsewhere, and computes at home.

    Ops on tensors from different devices are not refused here: the model itself would fail, and a Program has one device.
    """

    def __init__(self, home: torch.device) -> None:
        super().__init__()
        self.home = home
        self.made: list[Made] = []

    def follow(
        self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: Any, inner_args: Any, inner_kwargs: Any, outer: Any
    ) -> Any:
        wanted = given(func, args, kwargs).get("device")
        inner_args, inner_kwargs = pytree.tree_map(
            lambda leaf: self.home if leaf == ELSEWHERE and isinstance(leaf, torch.device) else leaf,
            (inner_args, inner_kwargs),
        )
        result = func(*inner_args, **inner_kwargs)
        device = _device_of_result(wanted, tensors)
        operands = [t for t in tensors if isinstance(t, WrapperTensor)]
        sources = {made: None for t in operands for made in _made(t)}
        if ELSEWHERE in [t.device for t in written(func, args, kwargs)] or device == ELSEWHERE:
            for t in operands:
                for made in _made(t):
                    # Torch itself moves what is copied, and takes scalars and indices from another device.
                    made.moved |= (legal := _may_cross(func, t))
                    made.stayed |= not legal
        result = wrap_result(result, outer, device)
        if _is_factory(func, wanted, tensors):
            sources = {Made(location_of(users_frame(list(frames()))), short_name(func), device): None}
            self.made += sources
        if device != ELSEWHERE:
            for t in pytree.tree_leaves(result):
                if isinstance(t, WrapperTensor) and t.device != ELSEWHERE:
                    t.made = {**_made(t), **sources}  # type: ignore[attr-defined]
        return result

    @staticmethod
    def stays(tensor: torch.Tensor) -> None:
        """An output of the model, on whatever device it is."""
        for made in _made(tensor):
            made.stayed = True


def _made(tensor: torch.Tensor) -> dict[Made, None]:
    """The factories behind a tensor that is not elsewhere."""
    return getattr(tensor, "made", {})


def _device_of_result(wanted: torch.device | None, tensors: Sequence[torch.Tensor]) -> torch.device:
    if wanted is not None:
        return wanted
    devices = [t.device for t in tensors]
    return ELSEWHERE if ELSEWHERE in devices else devices[0] if devices else torch.get_default_device()


def _may_cross(func: OpOverload, operand: torch.Tensor) -> bool:
    copies = func in (aten._to_copy.default, aten.copy_.default)
    indexes = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
    return copies or indexes or operand.dim() == 0


def _is_factory(func: OpOverload, device: torch.device | None, operands: Sequence[Any]) -> bool:
    """The op makes a tensor on a device of its own: it has no tensor operand, or an explicit `device`."""
    if not any(a.name == "device" for a in schema_of(func).arguments) or short_name(func) in ("_to_copy", "to"):
        return False
    return device is not None or not operands


class _Literals(WrapperFunctions):
    """Makes literals at home and moves them: a tensor that torch makes elsewhere holds no values."""

    def __init__(self, home: torch.device):
        super().__init__()
        self.home = home

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.new_tensor:
            like, *args_left = args
            kwargs = {"dtype": like.dtype, "device": like.device, **kwargs}
            func, args = torch.tensor, tuple(args_left)
        wanted = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and wanted is not None and torch.device(wanted) == ELSEWHERE:
            return func(*args, **{**kwargs, "device": self.home}).to(ELSEWHERE)
        return super().__torch_function__(func, types, args, kwargs)


# -- rewriting ----------------------------------------------------------------------------------------------------------


def follow_inputs(program: Program, source: Source) -> tuple[Program, list[str]]:
    """The Program with every device constant that the model took from its inputs replaced by an input's device.

    Also gives a line for the report for each of those that stay. Numbers, shapes and dtypes are the same. `program` comes
    from `source`, and may have been through passes: what they folded into a constant moves with the module as it is.
    """
    fixed = [node for node in program.calls if _names_a_device(node)]
    if not fixed:
        return program, []
    factories = _factories_behind(source, {(record(node).source, short_name(node.target)) for node in fixed})
    draft = Draft.of(program)
    anchor = _anchor(draft.program)
    notes: dict[str, None] = {}
    for node in draft.program.calls:
        if not _names_a_device(node):
            continue
        at, op = record(node).source, short_name(node.target)
        placement = factories.placement(at, op)
        if placement is DevicePlacement.FOLLOWS and anchor is not None:
            with draft.before(node, "follow_inputs"):
                new = _following(draft, node, anchor)
            draft.redirect(node, new)
            continue
        device = facts.device(node)
        what = f"{at + ': ' if at else ''}{op} makes a tensor on {device}"
        if placement is DevicePlacement.FIXED:
            notes[f"{what} whatever the inputs' device: the file cannot move to another device"] = None
        else:
            why = f" ({factories.unknown})" if factories.unknown else ""
            notes[f"{what}, and whether that follows the inputs is not known{why}: keep the file on that device"] = None
    return draft.finish(), list(notes)


def _names_a_device(node: fx.Node) -> bool:
    """The op puts its result on a device of its own, a constant or the default one, and there it stays."""
    if not isinstance(node.target, OpOverload) or "device" not in sum(argument_names(node.target), ()):
        return False
    if all(user.target is aten.to.other for user in node.users):
        return False
    return bound_arguments(node)["device"] is not None or not node.all_input_nodes


def _anchor(program: Program) -> fx.Node | None:
    """A value that is where the inputs are: an input, else a constant."""
    candidates = program.placeholders or program.graph.find_nodes(op="get_attr")
    return next((n for n in candidates if getattr(facts.fact(n), "layout", None) is torch.strided), None)


_NEW = {
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
    aten.full.default: aten.new_full.default,
    aten.empty.memory_format: aten.new_empty.default,
}


def _following(draft: Draft, node: fx.Node, anchor: fx.Node) -> fx.Node:
    """The tensor of a factory on the device of `anchor`."""
    dtype = facts.dtype(node)
    arguments = bound_arguments(node)
    plain = not arguments.get("pin_memory") and arguments.get("layout") in (None, torch.strided)
    if node.target in _NEW and plain and arguments.get("memory_format") is None:
        sizes = [arguments[name] for name in ("size", "fill_value") if name in arguments]
        return draft.call(_NEW[node.target], anchor, *sizes, dtype=dtype)
    where = draft.call(aten.new_empty.default, anchor, [0], dtype=dtype)
    made = draft.call(node.target, *node.args, **node.kwargs)
    return draft.call(aten.to.other, made, where)
