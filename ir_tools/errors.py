"""The root of the exception tree, and quoting other errors in ours."""


class PassesError(Exception):
    """Anything that torch-passes raises on purpose."""


def first_line(error: BaseException | str) -> str:
    """The first line of an error's message that says something; the last, where TorchScript puts its traceback above it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith("failed in the TorchScript interpreter."):
        return lines[-1].removeprefix("builtins.").removeprefix("RuntimeError: ")
    return lines[0] if lines else type(error).__name__
