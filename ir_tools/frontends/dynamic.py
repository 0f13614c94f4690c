"""Dynamic sizes: what the user declares (torch.export's convention), symbols for them, and the conditions they must meet.

    dynamic_shapes={"x": {0: Dim("batch"), 2: Dim("height", min=32)}}       by the names of forward's arguments
    dynamic_shapes=({0: Dim("batch")}, None)                                or by position

A size is a symbol while a model is captured. What torch asks of it on the way (that two sizes are equal, that a height is
even) is kept as conditions on the sizes; the Program, and the file made from it, hold for those sizes only, and say so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import DimDynamic
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from ir_tools.errors import PassesError
from ir_tools.frontends.errors import CaptureError
from ir_tools.ir.signature import Condition, DynamicSize, InputSpec

LEAST_HINT = 2
"""Sizes 0 and 1 broadcast, so that what holds for them holds for no other: a symbol never starts from one of these."""


class DynamicShapesError(PassesError, ValueError):
    """`dynamic_shapes` does not fit the inputs, or is written in a way that torch.export would not take either."""


# -- what the user declares ---------------------------------------------------------------------------------------------


def declared_sizes(dynamic_shapes: Any, arguments: dict[str, Any]) -> list[dict[int, DynamicSize]]:
    """Per tensor of a bound call, in pytree order: its dynamic axes.

    Raises `DynamicShapesError` naming the argument.
    """
    by_name = _by_name(dynamic_shapes, arguments)
    found: list[dict[int, DynamicSize]] = []
    for name, value in arguments.items():
        found += _of_value(by_name.get(name), value, name)
    if dynamic_shapes is not None and not any(found):
        raise DynamicShapesError("dynamic_shapes declares no size dynamic; leave it out, or give a Dim for an axis")
    return found


def _by_name(dynamic_shapes: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    if dynamic_shapes is None:
        return {}
    names = ", ".join(arguments)
    if isinstance(dynamic_shapes, dict):
        unknown = [name for name in dynamic_shapes if name not in arguments]
        if unknown:
            raise DynamicShapesError(f"dynamic_shapes names {unknown[0]!r}, which is no argument of the call; it has: {names}")
        return dynamic_shapes
    if isinstance(dynamic_shapes, (tuple, list)):
        if len(dynamic_shapes) != len(arguments):
            raise DynamicShapesError(
                f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(arguments)} arguments ({names}); give one for each"
            )
        return dict(zip(arguments, dynamic_shapes, strict=True))
    given = type(dynamic_shapes).__name__
    raise DynamicShapesError(f"dynamic_shapes must be a dict or a tuple, as for torch.export, got {given}")


def _of_value(spec: Any, value: Any, path: str) -> list[dict[int, DynamicSize]]:
    """The dynamic axes of every tensor in an argument."""
    if isinstance(value, torch.Tensor):
        return [_of_tensor(spec, value, path)]
    leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if spec is None or not leaves:
        return [{} for _ in leaves]
    if isinstance(value, dict) and isinstance(spec, dict):
        return [d for key, part in value.items() for d in _of_value(spec.get(key), part, f"{path}[{key!r}]")]
    if isinstance(value, (list, tuple)) and isinstance(spec, (list, tuple)) and len(spec) == len(value):
        pairs = enumerate(zip(value, spec, strict=True))
        return [d for i, (part, own) in pairs for d in _of_value(own, part, f"{path}[{i}]")]
    raise DynamicShapesError(f"dynamic_shapes of '{path}' must have the structure of the argument, got {spec!r}")


def _of_tensor(spec: Any, value: torch.Tensor, path: str) -> dict[int, DynamicSize]:
    if spec is None:
        return {}
    if isinstance(spec, (list, tuple)):
        if len(spec) != value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' has {len(spec)} entries, the tensor {value.dim()} axes")
        spec = dict(enumerate(spec))
    if not isinstance(spec, dict):
        raise DynamicShapesError(f"dynamic_shapes of '{path}' must be a dict of axes, a tuple or None, got {spec!r}")
    sizes: dict[int, DynamicSize] = {}
    for axis, dim in spec.items():
        if not isinstance(axis, int) or not -value.dim() <= axis < value.dim():
            raise DynamicShapesError(f"dynamic_shapes of '{path}' names axis {axis!r}; the tensor has {value.dim()}")
        size = _size(dim, value.shape[axis], f"{path}_{axis % value.dim()}", path, axis)
        if size is not None:
            sizes[axis % value.dim()] = size
    return sizes


def _size(dim: Any, given: int, name: str, path: str, axis: int) -> DynamicSize | None:
    """The declared size, None for one that is baked in."""
    if dim is None or dim is Dim.STATIC or (isinstance(dim, int) and dim == given):
        return None
    if dim in (Dim.AUTO, Dim.DYNAMIC):
        return DynamicSize(re.sub(r"\W", "_", name))
    if not hasattr(dim, "min") or hasattr(dim, "root"):
        raise DynamicShapesError(
            f"axis {axis} of '{path}' must be a torch.export.Dim, Dim.AUTO, Dim.DYNAMIC, Dim.STATIC or None, got {dim!r}; "
            "a size that is a multiple of another's is found by itself: give each axis its own Dim"
        )
    least, most = max(1, int(dim.min)), None if dim.max is None or dim.max >= 2**62 else int(dim.max)
    if given < least or (most is not None and given > most):
        allowed = f"{least} to {most or 'any'}"
        raise DynamicShapesError(f"axis {axis} of '{path}' is {given} in the example, outside {allowed} of {dim.__name__}")
    return DynamicSize(dim.__name__, least, most)


def specified(specs: Sequence[InputSpec], sizes: Sequence[dict[int, DynamicSize]]) -> tuple[InputSpec, ...]:
    """Input specs in which the declared axes are dynamic."""
    out = [
        replace(spec, shape=tuple(own.get(axis, size) for axis, size in enumerate(spec.shape)))
        for spec, own in zip(specs, sizes, strict=True)
    ]
    return tuple(out)


# -- symbols ------------------------------------------------------------------------------------------------------------


class Symbols:
    """The symbols of one Program under construction, by the names of the sizes."""

    def __init__(self, mode: FakeTensorMode):
        assert mode.shape_env is not None
        self.mode, self.env = mode, mode.shape_env
        self.by_name: dict[str, torch.SymInt] = {}
        self.sizes: dict[str, DynamicSize] = {}

    def fake(self, spec: InputSpec, example: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the input: symbols for its dynamic sizes; its axes lie in memory as those of the example do."""
        if not spec.is_dynamic:
            return self.mode.from_tensor(example.detach(), static_shapes=True)
        sizes = [self._of(s, n) if isinstance(s, DynamicSize) else s for s, n in zip(spec.shape, example.shape, strict=True)]
        strides: tuple[int, ...] = example.stride()
        order = sorted(range(example.dim()), key=lambda axis: (-strides[axis], axis))
        with self.mode:
            laid_out = torch.empty([sizes[axis] for axis in order], dtype=example.dtype, device=example.device)
            return laid_out if order == sorted(order) else laid_out.permute([order.index(i) for i in range(len(order))])

    def _of(self, size: DynamicSize, example: int) -> torch.SymInt:
        if size.name not in self.by_name:
            source, hint = ConstantSource(size.name), max(example, LEAST_HINT)
            symbol = self.env.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            self.env.constrain_symbol_range(
                symbol, compiler_min=max(size.least, LEAST_HINT), compiler_max=size.most or 2**62
            )  # type: ignore[no-untyped-call]
            self.by_name[size.name] = self.env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
            self.sizes[size.name] = size
        return self.by_name[size.name]

    def conditions(self) -> tuple[Condition, ...]:
        """What the capture asked of the sizes.

        Raises `CaptureError` for a declared size that turned out to have one value only, or a condition without a text.
        """
        names = {next(iter(symint.node._expr.free_symbols)): name for name, symint in self.by_name.items()}
        for symbol, name in names.items():
            value = self.env.replacements.get(symbol, symbol)
            if value.is_number:
                raise pinned(name, value)
        found = [g.expr for g in self.env.guards if g.expr.free_symbols and g.expr.free_symbols <= names.keys()]
        return unique(condition_of(e.xreplace({s: sympy.Symbol(n) for s, n in names.items()})) for e in found)


def pinned(name: str, value: Any) -> CaptureError:
    return CaptureError(
        f"the size {name!r} is declared dynamic, but the model as captured works for {name} = {value} only: "
        "it reads the size in Python, or computes with it; bake it in (None), or try another front end"
    )


def condition_of(expression: Any) -> Condition:
    """A condition from sympy, with the names of sizes for symbols."""
    return condition_from_text(PythonPrinter().doprint(expression))  # type: ignore[no-untyped-call]


_WORDS = frozenset({"max", "min", "and", "or", "not", "True", "False"})


def condition_from_text(text: str) -> Condition:
    """A condition written in Python. Raises `CaptureError` for what TorchScript does not read the same way."""
    if not re.fullmatch(r"[\w\s+\-*/%()<>=!,]*", text) or re.search(r"(?<![*/])/(?!/)|\*\*", text):
        raise CaptureError(f"the dynamic sizes must meet {text}, which cannot be checked when the file runs")
    names = tuple(dict.fromkeys(w for w in re.findall(r"[A-Za-z_]\w*", text) if w not in _WORDS))
    if re.search(r"[A-Za-z_]\w*\s*\(", re.sub(r"\b(max|min|and|or|not)\b", "", text)):
        raise CaptureError(f"the dynamic sizes must meet {text}, which cannot be checked when the file runs")
    return Condition(text, names)


def unique(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    """Each condition once, without those that only tell a size from 1: runs at size 1 are compared with the model's."""
    return tuple(dict.fromkeys(c for c in conditions if not re.fullmatch(r"\(?\w+\)? (!=|>|>=) [01]", c.text)))


# -- torch.export -------------------------------------------------------------------------------------------------------


def enlarged(tensor: torch.Tensor, sizes: dict[int, DynamicSize]) -> torch.Tensor:
    """The tensor repeated along dynamic axes of size 0 or 1, so that torch.export does not take them for constants."""
    for axis in sizes:
        if tensor.shape[axis] == 1:
            tensor = torch.cat([tensor, tensor], axis)
        elif tensor.shape[axis] == 0:
            tensor = tensor.new_zeros([LEAST_HINT if i == axis else n for i, n in enumerate(tensor.shape)])
    return tensor


def exported_conditions(exported: torch.export.ExportedProgram, specs: Sequence[InputSpec]) -> list[Condition]:
    """What torch.export guards: its guards on sizes, in the names of ours.

    Raises `CaptureError` when it made a constant of a declared size, or guards what is no size.
    """
    placeholders = [n for n in exported.graph.find_nodes(op="placeholder") if n.name in exported.graph_signature.user_inputs]
    tensors = [n.meta["val"] for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)]
    for spec, value in zip(specs, tensors, strict=True):
        for declared, size in zip(spec.shape, value.shape, strict=True):
            if isinstance(declared, DynamicSize) and isinstance(size, int):
                raise pinned(declared.name, size)

    def named(match: re.Match[str]) -> str:
        size = specs[int(match[1])].shape[int(match[2])]
        return size.name if isinstance(size, DynamicSize) else str(size)

    found = []
    for guard in getattr(exported, "_guards_code", ()):
        text = re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", named, guard)
        if "L[" in text:
            raise CaptureError(f"torch.export guards {guard}, which is no condition on sizes")
        found.append(condition_from_text(text))
    return found
