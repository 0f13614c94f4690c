"""Which folder may import which: arrows point one way, and torch's internals have one door.

And habits that can be read off the text of the passes.
"""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

from passes import CATALOGUE
from tests import private_names

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("ir_tools", "passes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
PASS_FILES = [ROOT / "passes" / f"{name}.py" for name in CATALOGUE]

EVERYBODY_MAY = {"ir", "errors", "torch_compat"}
"""Inside ir_tools."""
MAY_IMPORT = {
    "torch_compat": set(),
    "ir": {"errors", "torch_compat"},
    "frontends": EVERYBODY_MAY | {"verify"},
    "emit": EVERYBODY_MAY | {"verify"},
    "rewrite": EVERYBODY_MAY,
    "verify": EVERYBODY_MAY,
    "visualize": EVERYBODY_MAY,
    "errors": set(),
    "torchvision_ops": set(),
    "__init__": set(),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports by a relative path"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folder_of(path: Path) -> str:
    """The folder (or file) of ir_tools that `path` belongs to."""
    return path.relative_to(ROOT / "ir_tools").parts[0].removesuffix(".py")


IR_TOOLS = [path for path in FILES if path.is_relative_to(ROOT / "ir_tools")]


def test_there_is_something_to_check() -> None:
    assert {folder_of(path) for path in IR_TOOLS} == set(MAY_IMPORT), "a new folder of ir_tools: say what it may import"
    assert len(IR_TOOLS) > 30 and all(path.exists() for path in PASS_FILES)


@pytest.mark.parametrize("path", IR_TOOLS, ids=name_of)
def test_ir_tools_never_imports_passes(path: Path) -> None:
    assert not [m for m in imports(path) if m.split(".")[0] in ("passes", "tests", "benchmarks")]


@pytest.mark.parametrize("path", IR_TOOLS, ids=name_of)
def test_folders_of_ir_tools_import_downwards_only(path: Path) -> None:
    folder = folder_of(path)
    imported = {m.split(".")[1] for m in imports(path) if m.startswith("ir_tools.")} - {folder}
    assert imported <= MAY_IMPORT[folder], f"{name_of(path)} must not import ir_tools.{(imported - MAY_IMPORT[folder]).pop()}"


JIT_DOOR = ROOT / "ir_tools" / "torch_compat" / "jit.py"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_front_ends_emission_and_benchmarks_touch_torch_jit(path: Path) -> None:
    if {"frontends", "emit", "benchmarks"} & set(path.relative_to(ROOT).parts) or path == JIT_DOOR:
        return
    touched = [m for m in imports(path) if m.startswith(("torch.jit", "ir_tools.torch_compat.jit"))]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.jit"):
            touched.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not touched


@pytest.mark.parametrize("path", private_names.files(["ir_tools", "passes", "benchmarks"]), ids=name_of)
def test_only_the_door_uses_what_is_private_to_torch(path: Path) -> None:
    assert not private_names.private_uses(path), "go through ir_tools/torch_compat"
    assert not private_names.operators_not_in_the_table(path), "list it in ir_tools/torch_compat/operators.py"


def test_the_checks_see_what_they_look_for() -> None:
    """The same functions on files that do what the others must not."""
    assert "torch.jit" in imports(ROOT / "ir_tools" / "emit" / "torch_jit.py")
    assert "ir_tools.verify.numerics" in imports(ROOT / "passes" / "hooks.py")
    assert all(private_names.private_uses(path) for path in private_names.DOOR.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize(
    "line, seen",
    [
        ("from torch._ops import OpOverload", 1),
        ("from torch.utils import _pytree as pytree", 1),
        ("from torch.fx.experimental.proxy_tensor import make_fx", 1),
        ("import torch._dynamo", 1),
        ("torch._C._jit_set_profiling_mode(False)", 2),
        ("torch._check(x)", 1),
        ("target._schema.arguments", 1),
        ("x.untyped_storage()._cdata", 1),
        ("model._modules['a'] = 1", 1),
        ("graph._insert_point", 1),
        ("getattr(target, '_schema', None)", 1),
        ("monkeypatch.setattr('torch._dynamo.reset', f)", 1),
        ("slots = {'_c'}", 1),
        ("scripted._c.save(path, _extra_files=files)", 2),
        ("self._schema", 1),
        ("self._schema = 1\nself._schema", 0),  # a class's own
        ("target._schema\nself._schema = 1", 1),
        ("aten._softmax.default(x, -1, False)", 0),
        ("torch._softmax(x, -1, False)", 1),
        ("import torch.nn.functional\nx.__class__", 0),
    ],
)
def test_private_names_are_seen(line: str, seen: int, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(line)
    assert len(private_names.private_uses(tmp_path / "file.py")) == seen


def test_operators_with_an_underscore_are_seen(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        """NAMES = "aten::_softmax aten::_foo aten::__and__".split() + ["_fused_adam", "_softmax", "_ours"]"""
    )
    assert private_names.operators_not_in_the_table(tmp_path / "file.py") == ["aten::_foo", "aten::_fused_adam"]


# -- habits of pass files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "passes").rglob("*.py")), ids=name_of)
def test_no_node_surgery_in_passes(path: Path) -> None:
    forbidden = r"\bargs\[\s*-?\d+\s*\]|\.users\b|erase_node|recompile|meta\[|replace_all_uses|inserting_|\._node\b"
    assert not re.findall(forbidden, path.read_text())


def test_a_pass_is_a_page() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PASS_FILES}
    assert statistics.median(lengths.values()) < 120
    assert all(length < 160 for length in lengths.values()), lengths
