"""Errors of the front ends."""

from ir_tools.errors import PassesError


class CaptureError(PassesError, RuntimeError):
    """A model that a front end cannot capture; the message says where and why."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no message"
