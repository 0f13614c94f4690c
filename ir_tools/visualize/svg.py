"""Drawings as SVG, made by the graphviz program `dot` where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from ir_tools.files import write_atomically


def draw_svg(dot_text: str, path: str | os.PathLike[str], timeout: float = 20) -> str | None:
    """Draw `dot_text` as SVG into `path` with the graphviz program `dot`, for at most `timeout` seconds.

    Returns None on success, else one line that says why there is no SVG. The file is written whole or not at all.
    Raises `OSError` when `path` cannot be written.
    """
    program = shutil.which("dot")
    if program is None:
        return "graphviz program `dot` not found: DOT files are written, no SVG"
    try:
        done = subprocess.run([program, "-Tsvg"], input=dot_text.encode(), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"graphviz `dot` needed more than {timeout:g} s for {Path(path).name}: the DOT file is written, no SVG"
    if done.returncode != 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[0]
        return f"graphviz `dot` failed ({reason}): the DOT file is written, no SVG"
    write_atomically(Path(path), done.stdout)
    return None
