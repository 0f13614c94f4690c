"""Where in the model's Python something happened: the frames that lead there, without those of the modes that look on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import FrameType

Frame = tuple[str, int]
"""File and line."""


def frames() -> Iterator[Frame]:
    """The Python frames that lead here, innermost first, without those of the modes that look on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        if not file.endswith(LOOKED_THROUGH):
            yield frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back


LOOKED_THROUGH = (
    *(f"ir_tools/frontends/{name}.py" for name in ("wrapper_tensors", "value_reads", "read_dependence", "portability")),
    *("torch/overrides.py", "torch/utils/_python_dispatch.py", "torch/_ops.py"),
    *("torch/_compile.py", "torch/_dynamo/eval_frame.py"),  # around every mode's handler
)


def in_torch(frame: Frame) -> bool:
    return "/torch/" in frame[0].replace("\\", "/")


def users_frame(stack: Sequence[Frame]) -> Frame:
    """The innermost frame that is not torch's own, as `source_line` of a captured node says it."""
    return next((frame for frame in stack if not in_torch(frame)), stack[0])


def spelled(frame: Frame) -> str:
    """ "file.py:12" """
    return f"{frame[0].replace(chr(92), '/').rsplit('/', 1)[-1]}:{frame[1]}"
