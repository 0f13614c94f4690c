"""Old names of what users type. They work for one more release, with a `DeprecationWarning`."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

OURS = ("ir_tools", "passes")
RENAMED = ".* is now called .*; the old name works until the next release"
"""What these warnings say, as a warnings filter takes it."""


def warn_renamed(old: str, new: str) -> None:
    """Warn that `old` is now called `new`, at the line of the caller's own code that called into these packages."""
    frame: FrameType | None = sys._getframe(1)
    level = 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(f"{old} is now called {new}; the old name works until the next release", DeprecationWarning, stacklevel=level)
