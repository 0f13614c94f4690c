"""What importing the package costs: names are imported when they are asked for, and the command line starts without torch."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import passes

HEAVY = ("torch", "hypothesis", "networkx", "sympy")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("module", ["passes", "passes.errors", "passes.testing", "passes.cli.main"])
def test_what_needs_no_torch_imports_none(module: str) -> None:
    assert run(f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])") == "[]\n"


@pytest.mark.parametrize("arguments", ["--help", "--version", "optimize --help", "explain --help", "verify --help"])
def test_the_command_line_answers_without_torch(arguments: str) -> None:
    code = f"""
import sys
from passes.cli.main import main
sys.argv = ["torch-passes", *{arguments.split()}]
try:
    main()
except SystemExit as stopped:
    print(stopped.code, [m for m in {HEAVY} if m in sys.modules])
"""
    assert run(code).splitlines()[-1] == "0 []"


def test_a_name_of_the_package_is_that_of_its_home() -> None:
    homes = {name: module for module, names in passes.HOMES.items() for name in names.split()}
    assert sorted(homes) == sorted(passes.__all__)
    assert all(getattr(passes, name) is getattr(import_module(module), name) for name, module in homes.items())


def test_a_name_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'passes' has no attribute 'optimise'"):
        passes.optimise  # noqa: B018
