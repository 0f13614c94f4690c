"""Frames of the model's Python: those of the modes that look on are left out, whatever these files are called."""

from __future__ import annotations

import ast
from pathlib import Path

import torch

from ir_tools.frontends import python_frames
from ir_tools.frontends.python_frames import LOOKED_THROUGH, frames

FRONTENDS = Path(python_frames.__file__).parent
HANDLERS = {"__torch_dispatch__", "__torch_function__", "follow"}


def test_every_file_that_is_looked_through_exists():
    roots = (FRONTENDS.parent.parent, Path(torch.__file__).parent.parent)
    assert [name for name in LOOKED_THROUGH if not any((root / name).is_file() for root in roots)] == []


def test_every_file_whose_modes_ask_for_frames_is_looked_through():
    """Those that import `frames`, or `Read`, which asks for them, and hold a mode's handlers."""
    for path in FRONTENDS.glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {n.id for n in nodes if isinstance(n, ast.Name)}
        handles = HANDLERS & {n.name for n in nodes if isinstance(n, ast.FunctionDef)}
        if handles and names & {"frames", "Read"}:
            assert f"ir_tools/frontends/{path.name}" in LOOKED_THROUGH, path.name


def test_frames_begin_where_they_are_asked_for():
    assert next(frames())[0] == __file__
