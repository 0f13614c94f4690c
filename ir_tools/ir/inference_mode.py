"""`InferenceMode`: torch's fake tensors, one mode per Program, and how facts become them and come of them.

    mode.fake(fact)      what an op is run on          mode.fact_of(result)      what is known of what it gives

A fact keeps the fake tensor that it was made from, in a table of the mode: symbols then keep what torch knows of them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ir_tools.ir.facts import (
    UNKNOWN,
    Fact,
    ScalarFact,
    Sizes,
    TensorFact,
    TupleFact,
    contiguous_strides,
    size,
)
from ir_tools.torch_compat.fake import FakeTensorMode
from ir_tools.torch_compat.symbols import ShapeEnv, declare_size, replaced


class InferenceMode(FakeTensorMode):
    """A mode in which sizes may be symbols: those declared dynamic, and those that depend on data."""

    def __init__(self) -> None:
        env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
        super().__init__(allow_non_fake_inputs=False, shape_env=env)  # type: ignore[no-untyped-call]
        self._fakes: dict[TensorFact, torch.Tensor] = {}
        self._sizes: dict[Any, Any] = {}
        self.results: dict[Any, Fact] = {}
        """Facts that were inferred, by op and arguments; those with symbols of their own are not kept."""

    @property
    def env(self) -> ShapeEnv:
        assert self.shape_env is not None
        return self.shape_env

    # -- from facts ---------------------------------------------------------------------------------------------------

    def fake(self, known: Any) -> Any:
        """What an op is run on: a fake tensor, a (symbolic) number, a tuple of these; anything else stands for itself.

        Unknown strides are those of a contiguous tensor.
        """
        if isinstance(known, TensorFact):
            return self._fake_tensor(known)
        if isinstance(known, ScalarFact):
            return known.value if known.is_known else known.symbol
        if isinstance(known, TupleFact):
            return tuple(map(self.fake, known.parts))
        return known

    def _fake_tensor(self, known: TensorFact) -> torch.Tensor:
        if known.layout is torch.strided and known.strides is None:
            return self._made(known, contiguous_strides(known.shape))
        if known not in self._fakes:
            self._fakes[known] = self._made(known, known.strides)
        return self._fakes[known]

    def _made(self, known: TensorFact, strides: Sizes | None) -> torch.Tensor:
        given: dict[str, Any] = {"dtype": known.dtype, "device": known.device}
        with self:
            if strides is None:
                return torch.empty(self._symbolic(known.shape), layout=known.layout, **given)
            if not known.has_symbols:
                return torch.empty_strided(known.shape, strides, **given)
            # Made contiguous and then permuted: torch knows such layouts even where it knows no number.
            if strides == contiguous_strides(known.shape):
                return torch.empty(self._symbolic(known.shape), **given)
            if strides == contiguous_strides(known.shape[::-1])[::-1]:
                axes = list(range(known.rank))[::-1]
                return torch.empty(self._symbolic(known.shape[::-1]), **given).permute(axes)
            return torch.empty_strided(self._symbolic(known.shape), self._symbolic(strides), **given)

    def _symbolic(self, sizes: Sizes) -> list[Any]:
        return [n if isinstance(n, int) else self._symbol_of(n) for n in sizes]

    def _symbol_of(self, expression: Any) -> Any:
        if expression not in self._sizes:
            self._sizes[expression] = self.env.create_symintnode(expression, hint=None)
        return self._sizes[expression]

    # -- to facts -----------------------------------------------------------------------------------------------------

    def fact_of(self, result: Any) -> Fact:
        """The fact of what an op gives on fake tensors. A list or tuple gives one for each part; a fact stands for itself."""
        if isinstance(result, Fact):
            return result
        if isinstance(result, torch.Tensor):
            known = TensorFact.of(result)
            for n in (*result.shape, *(result.stride() if known.strides is not None else ())):
                if isinstance(n, torch.SymInt):
                    self._sizes.setdefault(size(n), n)
            self._fakes.setdefault(known, result)
            return known
        if isinstance(result, (list, tuple)):
            return TupleFact(tuple(map(self.fact_of, result)))
        return UNKNOWN if result is None else ScalarFact.of(result)

    def settled(self, known: Fact) -> Fact:
        """The fact with what was found out since about its symbols: that two are equal, or one a number."""
        if isinstance(known, TensorFact) and known.has_symbols:
            strides = None if known.strides is None else self._replaced(known.strides)
            now = TensorFact(self._replaced(known.shape), known.dtype, known.device, strides, known.layout)
            return known if now == known else replace(TensorFact.of(self.fake(now)), strides=strides)
        if isinstance(known, TupleFact):
            return TupleFact(tuple(map(self.settled, known.parts)))
        return ScalarFact.of(known.symbol) if isinstance(known, ScalarFact) and not known.is_known else known

    def _replaced(self, sizes: Sizes) -> Sizes:
        found = [n if isinstance(n, int) else replaced(self.env, n) for n in sizes]
        return tuple(int(n) if not isinstance(n, int) and n.is_number else n for n in found)

    # -- symbols ------------------------------------------------------------------------------------------------------

    def unknown_number(self, annotation: str) -> Fact:
        """The fact of a number of that TorchScript type of which nothing is known: a fresh symbol; `UNKNOWN` otherwise."""
        if annotation == "int":
            return ScalarFact.of(self.env.create_unbacked_symint())
        if annotation == "float":
            return ScalarFact.of(self.env.create_unbacked_symfloat())
        return ScalarFact.of(self.env.create_unbacked_symbool()) if annotation == "bool" else UNKNOWN

    def unknown_size(self, free: set[Any]) -> Any:
        """A fresh symbol for a size, put into `free`."""
        symbol = self.env.create_unbacked_symint()
        declare_size(symbol)
        self._sizes[size(symbol)] = symbol
        free.add(size(symbol))
        return size(symbol)
