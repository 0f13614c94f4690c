"""The code in the pages of docs/ and in the docstrings of `passes.testing` runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = ["writing_a_pass", "half_precision", "kernels"]
TESTING = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "passes" / "testing").rglob("*.py")
    if path.stem != "fuzz"
)


def blocks_of(page: str) -> list[str]:
    """The Python blocks of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", TUTORIALS)
def test_the_blocks_of_a_tutorial_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One after another in one namespace, as somebody who follows it would paste them."""
    blocks = blocks_of(page)
    assert blocks
    names: dict = {"__name__": "tutorial"}
    for block in blocks:
        exec(compile(block, f"docs/{page}.md", "exec"), names)
    if page == "writing_a_pass":
        assert "careless changed the numbers" in names["caught"]
        assert ".transpose(" in names["caught"] and "hold(Model, example_inputs, [careless]" in names["caught"]


@pytest.mark.parametrize("name", TESTING)
def test_the_examples_in_docstrings_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
