"""The proof that what Python reads does not depend on the inputs: a run on wrapper tensors follows which storages do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ir_tools.errors import first_line
from ir_tools.frontends.source import Source
from ir_tools.frontends.undisturbed import seeded, undisturbed
from ir_tools.frontends.user_model import call_model
from ir_tools.frontends.value_reads import MEMORY_READS, SCALAR_READS, Read
from ir_tools.frontends.wrapper_tensors import (
    WrapperError,
    WrapperFunctions,
    WrapperMode,
    WrapperTensor,
    given,
    wrap_result,
    written,
)
from ir_tools.ir.dialect import op_name
from ir_tools.torch_compat import pytree
from ir_tools.torch_compat.dispatch import TorchDispatchMode
from ir_tools.torch_compat.operators import OpOverload
from ir_tools.torch_compat.tensors import storage_id

aten = torch.ops.aten


@dataclass(frozen=True)
class Dependence:
    """What a run on wrapper tensors says of the reads in it: which depend on the inputs. `unknown`: why nothing can be said."""

    dependent: tuple[Read, ...] = ()
    unknown: str = ""

    @property
    def independent(self) -> bool:
        """No read depends on the inputs."""
        return not self.unknown and not self.dependent


class _Dependence(WrapperMode):
    """Follows which storages hold something that depends on the inputs (or on a random generator).

    Soundness: inputs, and whatever an op makes, are wrapped; an op with a dependent operand makes all its results and all
    that it writes dependent. Only the model's own tensors are bare, and those it must not write at all: what it reads from
    them would differ from call to call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self.dependent: list[Read] = []
        self._dependent: dict[int, StorageWeakRef] = {}  # a weak reference keeps the key from being given again
        self._models: dict[int, StorageWeakRef] = {}

    def wrap(self, tensor: torch.Tensor) -> WrapperTensor:
        """An input."""
        self._mark(self._dependent, tensor)
        return WrapperTensor(tensor, tensor.device)

    @staticmethod
    def _mark(table: dict[int, StorageWeakRef], tensor: torch.Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        table[reference.cdata] = reference

    def depends(self, tensor: torch.Tensor) -> bool:
        inside = tensor.inside if isinstance(tensor, WrapperTensor) else tensor
        return storage_id(inside) in self._dependent

    def note(self, read: Read, depends: bool) -> None:
        self.reads.append(read)
        if depends:
            self.dependent.append(read)

    def follow(
        self, func: Any, args: tuple, kwargs: dict[str, Any], tensors: Any, inner_args: Any, inner_kwargs: Any, outer: Any
    ) -> Any:
        for t in tensors:
            if t.layout is not torch.strided:
                raise WrapperError(f"a tensor has the layout {t.layout}")
            if not isinstance(t, WrapperTensor):
                self._mark(self._models, t)
        depends = any(map(self.depends, tensors)) or torch.Tag.nondeterministic_seeded in func.tags
        by_name = given(func, args, kwargs)
        result = func(*inner_args, **inner_kwargs)
        if func in SCALAR_READS:
            self.note(Read.here(SCALAR_READS[func], result), depends)
        elif depends and _depends_by_its_shape(func, by_name):
            self.dependent.append(Read.here(op_name(func).removeprefix("aten::")))
        if func is aten.lift_fresh.default:  # a tensor that Python has just made of numbers
            outer = {}
            result = result.clone()
        for t in written(func, inner_args, inner_kwargs):
            if storage_id(t) in self._models:
                raise WrapperError("forward writes into a tensor of the model")
            if depends:
                self._mark(self._dependent, t)
        if depends and not _reads_sizes_only(func, by_name):
            for t in pytree.tree_leaves(result):
                if isinstance(t, torch.Tensor):
                    self._mark(self._dependent, t)
        devices = [t.device for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        return wrap_result(result, outer, devices[0]) if devices else result


class _MemoryReadsOfWrappers(WrapperFunctions):
    """Lets Python have the memory of a wrapper tensor that is independent. (That of another cannot be had at all.)"""

    def __init__(self, mode: _Dependence):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in MEMORY_READS:
            tensor, *rest = args
            depends = self.mode.depends(tensor)
            bare = tensor.inside if isinstance(tensor, WrapperTensor) else tensor
            self.mode.note(Read.here(MEMORY_READS[func], bare.tolist()), depends)
            args = (tensor if depends else bare, *rest)
        return super().__torch_function__(func, types, args, kwargs)


def _depends_by_its_shape(func: OpOverload, by_name: dict[str, Any]) -> bool:
    """The size of the result depends on values (nonzero, unique, x[mask])."""
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    if func is not aten.index.Tensor:
        return True
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in by_name["indices"])


def _reads_sizes_only(func: OpOverload, by_name: dict[str, Any]) -> bool:
    return op_name(func).removeprefix("aten::") in _OF_SIZES and not isinstance(by_name.get("fill_value"), torch.Tensor)


_OF_SIZES = frozenset("zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full".split())
"""Ops that take sizes, dtype and device of a tensor, but no value. (Uninitialised memory does not count as a value.)"""


def dependence_of_reads(source: Source, reads: Sequence[Read]) -> Dependence:
    """Run the model on the first example, wrapped, and say which of `reads`, those of an ordinary run, depend on the inputs.

    A read that does not is the same for all inputs of these sizes, so that a trace may hold its value.
    """
    mode = _Dependence()
    try:
        arguments = source.signature.arguments([mode.wrap(t.clone()) for t in source.tensors])
        with undisturbed(source.model), seeded(), mode, _MemoryReadsOfWrappers(mode):
            call_model(source.model, arguments)
    except Exception as error:  # whatever wrapper tensors cannot follow: then nothing is proven
        return Dependence(unknown=f"{type(error).__name__}: {first_line(error)}")
    if mode.reads != list(reads):
        return Dependence(unknown="the model reads other values when it runs on wrapper tensors")
    return Dependence(tuple(mode.dependent))


class _ValueSized(TorchDispatchMode):
    """Notes the ops whose results' sizes depend on values: Python may read those sizes without asking for any value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if _depends_by_its_shape(func, given(func, args, kwargs or {})):
            self.found[f"the size of {op_name(func).removeprefix('aten::')}"] = None
        return func(*args, **(kwargs or {}))


def value_sized(source: Source) -> list[str]:
    """The ops of the model that make a tensor as large as its values say (`nonzero`, `unique`, a mask as an index)."""
    arguments = pytree.tree_map_only(torch.Tensor, torch.clone, source.examples[0].arguments)
    with undisturbed(source.model), seeded(), _ValueSized() as mode:
        call_model(source.model, arguments)
    return list(mode.found)
