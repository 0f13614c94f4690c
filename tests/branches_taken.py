"""Which branches and loops of a model's source a run takes."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import nn


class Watch:
    """The steps from line to line that Python takes in the functions of one file, recorded while it is entered."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        self.steps: list[tuple[int, int]] = []

    def __enter__(self) -> Watch:
        self._before = sys.gettrace()
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)

    def _on_call(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != self.filename:
            return None
        last = 0

        def on_line(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal last
            line = frame.f_lineno if event == "line" else -1
            if event in ("line", "return"):
                self.steps.append((last, line))
                last = line
            return on_line

        return on_line


def outcomes(tree: ast.AST, first_line: int, steps: Iterable[tuple[int, int]]) -> dict[tuple[int, str], tuple[bool, bool]]:
    """(line, "If" or "While") -> whether its condition was ever true, and ever false. Conditions stand on one line each."""
    steps = set(steps)
    seen = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.If, ast.While)):
            line, inside = node.lineno + first_line - 1, node.body[0].lineno + first_line - 1
            after = {to for at, to in steps if at == line}
            seen[line, type(node).__name__] = (inside in after, bool(after - {inside}))
    return seen


def path_taken(model: nn.Module, args: tuple) -> list[tuple[int, int]]:
    """The steps from line to line that `forward` takes on one call, also where that ends in an error of the model's own."""
    with Watch(str(inspect.getsourcefile(type(model)))) as watch, torch.no_grad(), suppress(ValueError):
        model(*args)
    return watch.steps


def outcomes_missed(model: nn.Module, paths: Iterable[list[tuple[int, int]]]) -> list[str]:
    """The outcomes of ifs and whiles in `forward` that none of the paths brings about, by line of the file it is in."""
    source, first_line = inspect.getsourcelines(type(model).forward)
    steps = [step for path in paths for step in path]
    tree = ast.parse(textwrap.dedent("".join(source)))
    return [
        f"{kind} in line {line} is never {outcome}"
        for (line, kind), both in outcomes(tree, first_line, steps).items()
        for outcome, was_seen in zip((True, False), both)
        if not was_seen
    ]
