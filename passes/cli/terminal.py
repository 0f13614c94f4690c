"""The terminal: facts, progress, and whether a file can be written there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from passes.errors import ModelFileError


def print_fact(console: Console, name: str, text: str) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=9)
    grid.add_column(overflow="fold")
    grid.add_row(name, Text(text))
    console.print(grid)


def make_folder_of(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelFileError(f"{path} cannot be written: {error.strerror or error}") from error


def check_writable(path: Path) -> None:
    """Raise `ModelFileError` when a file cannot be written at `path`: better before the work than after it."""
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory; expected the name of a file to write")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise ModelFileError(f"{path} cannot be written: {folder} is not a directory")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ModelFileError(f"{path} cannot be written: no permission")


@contextmanager
def progress_line(still: bool = False) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done now, with a spinner; on anything but a terminal it shows nothing.

    `still`: a plain line in place of the spinner, whose redrawing would disturb what is being timed.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda description: None
        return
    if still:
        yield lambda description: console.print(Text(description, style="dim"))
        return
    with console.status("starting") as status:
        yield lambda description: status.update(Text(description))
