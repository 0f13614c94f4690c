"""Writing files so that they appear complete or not at all: written beside the final path, moved there when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all, and that everybody may read.

    Raises `OSError` when it cannot be written.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)
        os.chmod(unfinished, 0o644)


@contextmanager
def replacing(path: Path, *, flushed: bool = False) -> Iterator[Path]:
    """Another path of the same name to write to; what is there in the end replaces the file at `path`.

    A failure leaves what was there before. `flushed`: the file is on the disk before it replaces the old one, so that not even
    a power cut leaves half of it. Raises `OSError` when it cannot be written.
    """
    # A folder, not a file, so that the name is the same: an archive is called inside as its file was when it was written.
    folder = tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        unfinished = Path(folder, path.name)
        yield unfinished
        if flushed:
            _flush(unfinished)
        os.replace(unfinished, path)
        if flushed:
            _flush(path.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Make the system write a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
