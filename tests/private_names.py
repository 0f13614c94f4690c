"""Where a file uses a name that is private to torch: with an underscore in front, or called experimental.

python -m tests.private_names               counts them, per folder
python -m tests.private_names passes tests  lists them
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from torch import fx, nn

from ir_tools.torch_compat.operators import UNDERSCORED_OPERATORS

ROOT = Path(__file__).parent.parent
DOOR = ROOT / "ir_tools" / "torch_compat"

OTHERS = frozenset({"_getframe", "_assert_has_ops"})
"""Names of Python (`sys._getframe`) and of torchvision (which `ir_tools/torchvision_ops.py` sees to)."""

BY_NAME = frozenset("getattr setattr hasattr delattr attrgetter getLogger import_module patch object".split())
"""Functions that take the name of an attribute or module as a string."""


def private_uses(path: Path) -> list[str]:
    """Each use of a name of torch's own that is private, with its line.

    An attribute is torch's unless a file of ours defines one of that name, and even then where the objects of torch have it
    too. Names of operators in the table of `torch_compat/operators.py` are free.
    """
    tree = ast.parse(path.read_text())
    here, ours = names_defined_in(tree), names_of_ours()
    uses: dict[tuple[int, str], str] = {}
    for node in ast.walk(tree):
        as_text = [node.value] if isinstance(node, ast.Constant) and node.value in names_behind_the_door() else []
        for text in paths_in(node):
            uses.setdefault((node.lineno, text), f"line {node.lineno}: {text}")
        for name in (*private_names(node), *as_text):
            on_self = isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "cls")
            own = name in here if on_self else name in here | ours and name not in names_of_torch()
            if not own:
                line = getattr(node, "lineno", 0)
                uses.setdefault((line, name), f"line {line}: {ast.unparse(node).splitlines()[0]}")
    return list(uses.values())


def private_names(node: ast.AST) -> Iterator[str]:
    """The names in one node of the syntax that would be private if they are torch's."""
    if isinstance(node, ast.ImportFrom) and of_torch(str(node.module)):
        yield from (n for a in node.names for n in private_parts(f"{node.module}.{a.name}")[-1:])
    elif isinstance(node, ast.Import):
        yield from (n for a in node.names if of_torch(a.name) for n in private_parts(a.name)[-1:])
    elif isinstance(node, ast.Attribute):
        experimental = node.attr == "experimental" and of_torch(ast.unparse(node.value))
        if experimental or (is_private(node.attr) and not is_operator(node)):
            yield node.attr
    elif isinstance(node, ast.keyword) and node.arg and is_private(node.arg):
        yield node.arg
    elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in BY_NAME:
        for text in (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)):
            if re.fullmatch(r"[\w.]+", text) and (of_torch(text) or is_private(text)):
                yield from private_parts(text)[-1:]


def paths_in(node: ast.AST) -> list[str]:
    """Private paths and dotted names of torch's in a string of one line: `"torch/_export/"`, `"call torch._foo.bar"`."""
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value else ""
    found = re.findall(r"\btorch[/.][\w/.]+", text)
    return [path for path in found if set(private_parts(path.removesuffix(".py").replace("/", "."))) - OPERATORS]


def of_torch(dotted: str) -> bool:
    return dotted.partition(".")[0] == "torch"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in OTHERS


def private_parts(dotted: str) -> list[str]:
    return [part for part in dotted.split(".") if is_private(part) or part == "experimental"]


def is_operator(node: ast.Attribute) -> bool:
    """`aten._softmax`, but not `torch._softmax`."""
    return node.attr in OPERATORS and ast.unparse(node.value) != "torch"


OPERATORS = frozenset(name.split("::")[1] for name in UNDERSCORED_OPERATORS)


def operators_not_in_the_table(path: Path) -> list[str]:
    """Operators whose name begins with an underscore, in the strings of a file: `"aten::_softmax"`, or `"_softmax"` alone."""
    constants = [n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)]
    strings = [text for text in constants if isinstance(text, str)]
    named = {name for text in strings for name in re.findall(r"\b(?:aten|prim|mkldnn)::_(?!_)\w+", text)}
    named |= {f"aten::{text}" for text in strings if re.fullmatch(r"_[a-z]\w+", text) and hasattr(torch.ops.aten, text)}
    return sorted(named - UNDERSCORED_OPERATORS)


def names_defined_in(tree: ast.AST) -> set[str]:
    """The names of functions, classes, variables and attributes, and of methods in TorchScript text."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= set(re.findall(r"\bdef (_\w+)\(", node.value))
    return names


@cache
def names_of_ours() -> frozenset[str]:
    found: set[str] = set()
    for folder in ("ir_tools", "passes", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            if DOOR not in path.parents:
                found |= names_defined_in(ast.parse(path.read_text()))
    return frozenset(found)


@cache
def names_behind_the_door() -> frozenset[str]:
    """The private names that the door itself uses."""
    found: set[str] = set()
    for path in DOOR.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            found |= set(private_names(node))
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SLOTS":
                found |= {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(found)


@cache
def names_of_torch() -> frozenset[str]:
    """The private names behind the door, and those of the objects of torch that we hold most."""
    graph = fx.Graph()
    held = (torch.Tensor, nn.Module(), graph, graph.placeholder("x"), fx.GraphModule, torch.jit.ScriptModule)
    members = {name for thing in (*held, torch.ops.aten.relu.default) for name in dir(thing) if is_private(name)}
    return names_behind_the_door() | members


def files(folders: Iterable[str]) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if DOOR not in path.parents]


def main(folders: list[str]) -> None:
    for folder in folders or ["passes", "ir_tools", "benchmarks", "tests"]:
        found = {path: private_uses(path) for path in files([folder])}
        for path, uses in found.items() if folders else ():
            for use in uses:
                print(f"{path.relative_to(ROOT)}, {use}")
        print(f"{folder}: {sum(map(len, found.values()))} in {sum(map(bool, found.values()))} files")


if __name__ == "__main__":
    main(sys.argv[1:])
