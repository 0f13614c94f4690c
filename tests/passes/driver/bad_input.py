"""What the tests of bad input share: a small model, and the pattern of a message."""

from __future__ import annotations

import re

from torch import nn

from tests.models import Case, Linear, row


def small() -> Case:
    return Case(Linear(), (row(),))


class Runs(Linear):
    def forward(self, x):
        return self.linear(x)


def model() -> nn.Module:
    return Runs().eval()


def says(*parts: str) -> str:
    """A pattern for a message that holds all of the parts, in this order."""
    return "(?s)" + ".*".join(re.escape(part) for part in parts)
