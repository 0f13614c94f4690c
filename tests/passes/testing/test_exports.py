"""What `passes.testing` exports: imported when it is asked for; names of earlier releases still work, with a warning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import passes.testing

ROOT = Path(__file__).parents[3]
ALONE = "import sys, passes.testing; print([name for name in ('torch', 'hypothesis') if name in sys.modules])"
AFTER_THE_FILES = """
import importlib, pathlib
for name in sorted(path.stem for path in pathlib.Path("passes/testing").glob("*.py") if path.stem != "__init__"):
    importlib.import_module(f"passes.testing.{name}")
import passes.testing
print([name for name in passes.testing.__all__ if isinstance(getattr(passes.testing, name), type(importlib))])
"""


@pytest.mark.parametrize(
    "program, printed",
    [(ALONE, "[]"), (AFTER_THE_FILES, "[]")],
    ids=["neither torch nor hypothesis is imported", "no file hides an export"],
)
def test_importing(program: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == printed, done.stderr


def test_every_export_is_there_and_listed() -> None:
    exported = {name for names in passes.testing.HOMES.values() for name in names.split()}
    assert exported == set(passes.testing.__all__) <= set(dir(passes.testing))
    assert all(getattr(passes.testing, name).__name__ == name for name in exported)


@pytest.mark.parametrize("old, new", [("LawBroken", "InvariantBroken"), ("hold_to_laws", "check_invariants")])
def test_names_of_earlier_releases_warn(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"passes.testing.{old} is now called {new}"):
        assert getattr(passes.testing, old) is getattr(passes.testing, new)


def test_a_name_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(AttributeError, match=r"module 'passes\.testing' has no attribute 'nothing'"):
        passes.testing.nothing  # noqa: B018
