"""Which folder may import which: arrows point in one direction, and torch's internals have one door.

And habits that can be read off the text of the passes.
"""

from __future__ import annotations

import ast
import re
import statistics
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

from passes import CATALOGUE

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("ir_tools", "passes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PASS_FILES = [path for name in CATALOGUE for path in sorted((ROOT / "passes").glob(f"*/{name}.py"))]

JIT_DOOR = ROOT / "ir_tools" / "torch_compat" / "jit.py"

EVERYBODY_MAY = {"ir", "errors", "deprecation", "files", "torch_compat"}
"""Inside ir_tools."""
MAY_IMPORT = {
    "errors": set(),
    "deprecation": set(),
    "files": set(),
    "torchvision_ops": set(),
    "torch_compat": set(),
    "ir": EVERYBODY_MAY - {"ir"},
    "frontends": EVERYBODY_MAY | {"verify"},
    "emit": EVERYBODY_MAY | {"verify"},
    "rewrite": EVERYBODY_MAY,
    "verify": EVERYBODY_MAY,
    "visualize": EVERYBODY_MAY,
    "__init__": set(),
}
"""What each folder of ir_tools may import of the others."""

KINDS = {"cleanup", "fold", "fuse", "precision", "quantize", "lower"}
"""The rooms that hold passes."""
ROOMS = {
    "errors": set(),
    "version": set(),
    "tune": {"errors"},
    "analysis": {"errors"},
    **{room: {"errors"} for room in KINDS - {"lower", "precision", "quantize"}},
    "precision": {"errors", "analysis"},
    "quantize": {"errors", "analysis"},
    "lower": {"errors", "tune"},
    "report": {"errors", "tune"},
    "driver": {"errors", "version", "tune", "report", *KINDS},
    "cli": {"errors", "version", "tune", "report", "driver"},
    "testing": {"errors", "driver"},
    "__init__": {"errors", "tune", "lower", "report", "driver", "testing"},
    "__main__": {"cli"},
}
"""What each room of passes may import of the others: those before it."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names of all modules that a file imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports by a relative path"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def folder_of(path: Path) -> str:
    """The folder (or file) of ir_tools or passes that `path` belongs to."""
    return path.relative_to(ROOT).parts[1].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def arrows(paths: Iterable[Path]) -> nx.DiGraph:
    """Which file imports which, by dotted names; `from a import b` goes to the file `a.b` if there is one, else to `a`."""
    graph: nx.DiGraph = nx.DiGraph()
    graph.add_nodes_from(module_of(path) for path in paths)
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found = {name if name in graph else str(node.module) for name in names}
            else:
                continue
            graph.add_edges_from((module_of(path), module) for module in found if module in graph)
    return graph


IR_TOOLS = [path for path in FILES if path.is_relative_to(ROOT / "ir_tools")]
PASSES = [path for path in FILES if path.is_relative_to(ROOT / "passes")]


def test_there_is_something_to_check() -> None:
    assert {folder_of(path) for path in IR_TOOLS} == set(MAY_IMPORT), "a new folder of ir_tools: say what it may import"
    assert {folder_of(path) for path in PASSES} == set(ROOMS), "a new room of passes: say what it may import"
    assert len(IR_TOOLS) > 30 and [path.stem for path in PASS_FILES] == list(CATALOGUE), "each pass has one file of its name"
    assert {folder_of(path) for path in PASS_FILES} == KINDS


@pytest.mark.parametrize("path", IR_TOOLS, ids=name_of)
def test_ir_tools_never_imports_passes(path: Path) -> None:
    assert not [m for m in imports(path) if m.split(".")[0] in ("passes", "tests", "benchmarks")]


@pytest.mark.parametrize("path", IR_TOOLS, ids=name_of)
def test_folders_of_ir_tools_import_downwards_only(path: Path) -> None:
    folder = folder_of(path)
    imported = {m.split(".")[1] for m in imports(path) if m.startswith("ir_tools.")} - {folder}
    assert imported <= MAY_IMPORT[folder], f"{name_of(path)} must not import ir_tools.{(imported - MAY_IMPORT[folder]).pop()}"


@pytest.mark.parametrize("path", PASSES, ids=name_of)
def test_rooms_of_passes_import_downwards_only(path: Path) -> None:
    room = folder_of(path)
    imported = {m.split(".")[1] for m in imports(path) if m.startswith("passes.")} & set(ROOMS) - {room}
    assert imported <= ROOMS[room], f"{name_of(path)} must not import passes.{(imported - ROOMS[room]).pop()}"


@pytest.mark.parametrize("path", [path for path in PASSES if folder_of(path) in KINDS], ids=name_of)
def test_only_the_driver_runs_the_model(path: Path) -> None:
    """What a run shows comes to a pass as an artifact."""
    runs = ("ir_tools.frontends",) if path.name == "target.py" else ("ir_tools.frontends", "ir_tools.emit")
    assert not [m for m in imports(path) if m.startswith(runs)], "a target names its emitter; else only the driver emits"
    assert not re.findall(r"\.run\(|\btrace_values\b|\bObservation\b", path.read_text())


@pytest.mark.parametrize("path", PASSES, ids=name_of)
def test_passes_import_from_the_file_that_defines_a_name(path: Path) -> None:
    """Not from the package, which would hide what a room imports."""
    assert "passes" not in imports(path)


def test_rooms_and_folders_stand_on_each_other() -> None:
    """Each may import what comes before it, so that none comes before itself."""
    for may in (ROOMS, MAY_IMPORT):
        assert nx.is_directed_acyclic_graph(nx.DiGraph([(a, b) for a, below in may.items() for b in below]))


def test_no_circle_between_files() -> None:
    graph = arrows(IR_TOOLS + PASSES)
    assert graph.number_of_edges() > 300
    assert [sorted(circle) for circle in nx.simple_cycles(graph)] == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_front_ends_emission_and_benchmarks_touch_torch_jit(path: Path) -> None:
    if {"frontends", "emit", "benchmarks"} & set(path.relative_to(ROOT).parts) or path == JIT_DOOR:
        return
    touched = [m for m in imports(path) if m.startswith(("torch.jit", "ir_tools.torch_compat.jit"))]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.jit"):
            touched.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not touched


def test_the_checks_see_what_they_look_for() -> None:
    """The same functions on files that do what the others must not."""
    assert "torch.jit" in imports(ROOT / "ir_tools" / "emit" / "torch_jit.py")
    assert "ir_tools.verify.numerics" in imports(ROOT / "passes" / "driver" / "verification.py")
    assert "passes.driver.optimize" in imports(ROOT / "passes" / "cli" / "commands.py"), "an import inside of a function"
    assert "driver" not in ROOMS["fold"] and "passes" in imports(ROOT / "benchmarks" / "fusion.py")
    graph = arrows(IR_TOOLS + PASSES)
    assert graph.has_edge("passes.driver.catalogue", "passes.fold.fuse_conv_bn")
    assert graph.has_edge("passes.driver.catalogue", "ir_tools.rewrite"), "a name that a package exports"
    assert not graph.has_edge("passes.lower.lower_onednn", "passes.lower.variants"), "its files are imported, and nothing of it"


# -- habits of pass files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "passes").rglob("*.py")), ids=name_of)
def test_no_node_surgery_in_passes(path: Path) -> None:
    forbidden = r"\bargs\[\s*-?\d+\s*\]|\.users\b|erase_node|recompile|meta\[|replace_all_uses|inserting_|\._node\b"
    assert not re.findall(forbidden, path.read_text())


@pytest.mark.parametrize("path", IR_TOOLS + PASSES, ids=name_of)
def test_a_file_is_one_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def test_a_pass_is_a_page() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PASS_FILES}
    assert statistics.median(lengths.values()) < 120
    assert all(length < 160 for length in lengths.values()), lengths
