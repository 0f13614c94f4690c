"""Symbols: what stands for a dynamic size while a model is captured, and the conditions that torch put on it.

That two sizes are equal, or that a height is even, is kept as conditions on the sizes; the Program, and the file made from it,
hold for those sizes only, and say so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch

from ir_tools.errors import CaptureError
from ir_tools.frontends.conditions import condition_of, unique
from ir_tools.ir.signature import Condition, DynamicSize, InputSpec
from ir_tools.torch_compat.export import NamedSource
from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torch_compat.symbols import DimDynamic, backed_size_oblivious, expression_as_made

LEAST_HINT = 2
"""Sizes 0 and 1 broadcast, so that what holds for them need not hold for others: the hint of a symbol is never one of these."""


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
            source, hint = NamedSource(size.name), max(example, LEAST_HINT)
            symbol = self.env.create_symbol(
                hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None, do_not_specialize_zero_one=True
            )
            self.env.constrain_symbol_range(symbol, compiler_min=max(size.least, LEAST_HINT), compiler_max=size.most or 2**62)  # type: ignore[no-untyped-call]
            self.by_name[size.name] = self.env.create_symintnode(symbol, hint=hint, source=source)  # type: ignore[assignment]
            self.sizes[size.name] = size
        return self.by_name[size.name]

    def conditions(self) -> tuple[Condition, ...]:
        """The conditions that the capture put on the sizes.

        Raises `CaptureError` for a declared size that turned out to have one value only, or a condition without a text.
        """
        names = {next(iter(expression_as_made(symint).free_symbols)): name for name, symint in self.by_name.items()}
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


def size_oblivious() -> AbstractContextManager[None]:
    """While sizes are symbols, ops do not ask whether one of them is 1 where the answer only saves work.

    Otherwise each question whether a tensor is contiguous would leave a condition such as `(h // 32) != 1` behind.
    """
    return backed_size_oblivious()
