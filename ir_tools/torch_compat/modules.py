"""Modules: the base of the batch norms, and what a module itself registers."""

from __future__ import annotations

import torch
from torch import nn

BatchNorm = nn.modules.batchnorm._BatchNorm
"""The base class of all batch norms."""


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers of the module itself by name, those that are None among them."""
    return module._buffers
