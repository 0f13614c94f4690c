"""The Python frames of the model at some point of a run, without those of the dispatch modes that observe it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType

from ir_tools.torch_compat.dispatch import FILES_AROUND_MODES

Frame = tuple[str, int]
"""File and line."""


def frames() -> Iterator[Frame]:
    """The Python frames that lead here, innermost first, without those of the dispatch modes that observe the run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not file.endswith(LOOKED_THROUGH):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


LOOKED_THROUGH = (
    *(f"ir_tools/frontends/{name}.py" for name in ("wrapper_tensors", "value_reads", "read_dependence", "portability")),
    *FILES_AROUND_MODES,
)


def in_torch(frame: Frame) -> bool:
    return "/torch/" in frame[0].replace("\\", "/")


def users_frame(stack: Sequence[Frame]) -> Frame:
    """The innermost frame that is not torch's own, as `source_line` of a captured node says it."""
    return next((frame for frame in stack if not in_torch(frame)), stack[0])


def location_of(frame: Frame) -> str:
    """ "file.py:12" """
    return f"{frame[0].replace(chr(92), '/').rsplit('/', 1)[-1]}:{frame[1]}"
