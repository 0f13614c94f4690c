"""The root of the exception tree."""


class PassesError(Exception):
    """Anything that torch-passes raises on purpose."""
