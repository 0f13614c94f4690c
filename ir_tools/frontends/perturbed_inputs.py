"""Perturbed inputs: other values of the same sizes and dtypes as the example's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


def perturbed(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(what was done, inputs) of the same sizes and dtypes, each different from the example and from those before.

    Integers stay between the smallest and the largest of the example and zero, so that indices stay in range. (Inputs of
    other sizes: `trials`.)
    """
    seen = [list(tensors)]
    for kind, change in PERTURBATIONS.items():
        generator = torch.Generator().manual_seed(0)
        try:
            changed = [change(t, generator) if t.numel() else t for t in tensors]
        except RuntimeError:  # a dtype without arithmetic
            continue
        if not any(all(map(_same_values, changed, other)) for other in seen):
            seen.append(changed)
            yield kind, changed


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _is_signed(t: torch.Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _negated(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if t.dtype is torch.bool:
        return ~t
    return -t if _is_signed(t) else t.min().clamp(max=0) + t.max() - t


def _shuffled(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return t.flatten()[torch.randperm(t.numel(), generator=generator).to(t.device)].reshape(t.shape)


def _zero(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    zeros = torch.zeros_like(t)
    return zeros if _is_signed(t) or t.dtype is torch.bool else zeros.clamp(max=t.max())


def _positive(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if t.dtype is torch.bool:
        return torch.ones_like(t)
    return t.abs().to(t.dtype) + 0.5 if _is_signed(t) else t.max().expand_as(t).clone()


def _large(t: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return t * 100 if _is_signed(t) else t


PERTURBATIONS = {"negated": _negated, "shuffled": _shuffled, "zero": _zero, "positive": _positive, "large": _large}
