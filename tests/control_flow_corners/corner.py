"""The base class of all corners."""

from __future__ import annotations

from torch import nn


class Corner(nn.Module):
    """A model with a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
