"""Which of a model's factory ops put their tensors where the inputs are: the model runs on wrapper tensors.

Capture bakes devices in. The wrapper tensors claim to be on another device: a factory that then asks for that device, or whose
tensor is moved to it later, follows the inputs. The pass `follow_inputs` takes what is found here. (Dtypes need none of this: a
file checks those of its inputs.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.func import functional_call

from ir_tools.errors import first_line
from ir_tools.frontends.perturbed_inputs import perturbed
from ir_tools.frontends.python_frames import frames, location_of, users_frame
from ir_tools.frontends.source import Source
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.frontends.user_model import FlatModel
from ir_tools.frontends.wrapper_tensors import WrapperFunctions, WrapperMode, WrapperTensor, given, wrap_result, written
from ir_tools.ir import Program
from ir_tools.ir.dialect import short_name
from ir_tools.ir.provenance import record
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.operators import OpOverload, schema_of
from ir_tools.verify.device_placement import ELSEWHERE, DevicePlacement, Factories, Made, names_a_device

aten = torch.ops.aten

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


def factories_behind(source: Source, program: Program) -> Factories:
    """The factories of the model behind the ops of a Program that name a device; none, and no run, where there is no such op.

    They are those of the example's run, and of runs on perturbed inputs while the placement of one of these ops is unknown: a
    captured graph may hold what the example's own run left out, as models skip a mask of ones unless they are traced.
    """
    wanted = {(record(node).source, short_name(node.target)) for node in program.calls if names_a_device(node)}
    if not wanted:
        return Factories()
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
