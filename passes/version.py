"""The version of torch-passes that is installed."""

from importlib.metadata import PackageNotFoundError, version


def installed_version() -> str:
    """The version of the installed distribution, "unknown" when run from a bare checkout."""
    try:
        return version("torch-passes")
    except PackageNotFoundError:
        return "unknown"
