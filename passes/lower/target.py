"""A target: what a whole Program is lowered to and emitted as, and the kernels that there are for it.

    target = Target("mine", providers=(fast_linear, fast_softmax), needs="AVX-512", portable=False)
    optimize(model, engine=target, example_inputs=x)

Where no provider supports a subgraph, it stays in ATen, and the dialect's own ops are replaced by what they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import OptionError
from ir_tools.rewrite.decompositions import DECOMPOSITIONS
from ir_tools.rewrite.shapes import TableEntry
from passes.lower.kernel_provider import KernelProvider


def anywhere(devices: Collection[torch.device]) -> str | None:
    return None


@dataclass(frozen=True, eq=False)
class Target:
    """What `engine=` of `optimize` means, for a whole Program.

    - `name`: what users write, and what report and manifest say. `lowering`: the name of its pass, `lower_<name>` by default.
    - `providers`: its kernels, in order; of several that support a subgraph the first is the default.
    - `decompositions`: per op, what it is replaced by where no provider supports it.
    - `emitter`: from a lowered Program to a ScriptModule.
    - `needs`: what its files need to run, for people. `portable`: its files may be moved to another device;
      not where a provider prepacks.
    - `available(devices)`: None, or why this torch, or these devices of the inputs, do not do.
    - `namespaces`: those of ops that only its lowering makes. A model that holds such an op was compiled before.
    """

    name: str
    providers: tuple[KernelProvider, ...] = ()
    decompositions: Mapping[Any, TableEntry] = field(default_factory=lambda: dict(DECOMPOSITIONS))
    emitter: Callable[..., Any] = emit
    needs: str = ""
    portable: bool = False
    available: Callable[[Collection[torch.device]], str | None] = anywhere
    namespaces: frozenset[str] = frozenset()
    lowering: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "providers", tuple(self.providers))
        object.__setattr__(self, "namespaces", frozenset(self.namespaces))
        names = [provider.name for provider in self.providers]
        if len(set(names)) < len(names):
            raise OptionError(f"the target {self.name!r} has two kernel providers of one name: {', '.join(names)}")
        prepacking = [provider.name for provider in self.providers if provider.prepack]
        if self.portable and prepacking:
            why = f"what the kernels of {', '.join(prepacking)} prepack stays on the device where the file was loaded"
            raise OptionError(f"the target {self.name!r} cannot be portable: {why}; leave out portable=")
        if not self.lowering:
            object.__setattr__(self, "lowering", f"lower_{self.name}")

    def with_providers(self, *providers: KernelProvider, behind: bool = False) -> Target:
        """The target with more kernels: before those that it has, so that they are the default, or behind them.

        Its files move between devices no more if one of the new kernels prepacks.
        """
        together = (*self.providers, *providers) if behind else (*providers, *self.providers)
        return replace(self, providers=together, portable=self.portable and not any(p.prepack for p in providers))

    @property
    def exact(self) -> bool:
        """Lowering changes no bit of any result."""
        return all(provider.exact for provider in self.providers)
