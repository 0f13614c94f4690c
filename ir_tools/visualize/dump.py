"""Numbered drawings of a Program after each step, with what the step made marked."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ir_tools.files import write_atomically
from ir_tools.ir.program import Program, all_nodes
from ir_tools.visualize.svg import draw_svg
from ir_tools.visualize.to_dot import to_dot


def write_dump(
    program: Program,
    directory: str | os.PathLike[str],
    index: int,
    name: str,
    previous: Program | None = None,
    *,
    timeout: float = 20,
    report: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write `03-fuse_conv_bn.dot` and, where possible, `03-fuse_conv_bn.svg`; return the paths written.

    Nodes that `previous` (the Program before this step) does not have are marked as new. `report` is called with one line
    when there is no SVG. Raises `OSError` when the directory cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{index:02d}-{name}"
    before = {n.name for n in all_nodes((previous or program).graph)}
    new = frozenset(n.name for n in program.all_calls if n.name not in before)
    title = f"{stem}: {len(program)} ops"
    if previous is not None:
        title += " (unchanged)" if program is previous else f" ({len(previous)} before, {len(new)} new)"
    text = to_dot(program, title=title, new_nodes=new)
    dot_path = folder / f"{stem}.dot"
    write_atomically(dot_path, text.encode())
    svg_path = folder / f"{stem}.svg"
    svg_path.unlink(missing_ok=True)  # a drawing of an earlier run would show another graph
    reason = draw_svg(text, svg_path, timeout)
    if reason is not None:
        report(reason)
        return [dot_path]
    return [dot_path, svg_path]
