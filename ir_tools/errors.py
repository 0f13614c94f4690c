"""The root of the exception tree, and quoting other errors in ours."""


class PassesError(Exception):
    """Anything that torch-passes raises on purpose."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
