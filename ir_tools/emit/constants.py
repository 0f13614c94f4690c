"""Where constants live in the emitted module: a tree of submodules that follows the user's parameter paths."""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn
from torch.jit import RecursiveScriptModule

from ir_tools.emit.torch_jit import Box, new_box
from ir_tools.ir.program import Program, public_name
from ir_tools.torch_compat.jit import SLOTS

Path = tuple[str, ...]

# A submodule or parameter cannot have the name of an attribute of `nn.Module` or of a slot of torch's own ScriptModule
# class. Names of that class's properties, such as `graph` or `code`, do no harm.
_RESERVED = (
    set(dir(nn.Module()))
    | {name for name in dir(RecursiveScriptModule) if name.startswith("_")}
    | SLOTS
    # Names in the text that torch writes into a file, where a variable is called after the attribute it was read from.
    # Others, such as `self` (BERT's `attention.self`) or `len`, it knows to avoid.
    | {"torch", "annotate", "bool", "sorted", "str", "NoneType", "Ellipsis"}
    | set(keyword.kwlist)
)
# Names of methods and of numbers that emission adds to the root.
_OURS = re.compile(r"_chunk_\d+|_pack_\d+|_float_\d+|_check_\w+|_dtype_name|_unread")


def place_constants(names: Iterable[str]) -> dict[str, Path]:
    """The attribute path of each constant: the user's own path where that is legal and nobody else's."""
    names = list(names)
    users = Counter(public_name(name) for name in names)
    wanted = {name: public_name(name) if users[public_name(name)] == 1 else name for name in names}
    cleaned = {name: tuple(_legal(part) for part in path.split(".")) for name, path in wanted.items()}
    submodules = {path[:depth] for path in cleaned.values() for depth in range(1, len(path))}
    taken = set(submodules)
    placed: dict[str, Path] = {}
    # A constant whose name is legal as it stands has the first claim to it.
    for name in sorted(names, key=lambda n: ".".join(cleaned[n]) != wanted[n]):
        path, count = cleaned[name], 1
        while path in taken:
            count += 1
            path = (*cleaned[name][:-1], f"{cleaned[name][-1]}_{count}")
        taken.add(path)
        placed[name] = path
    return {name: placed[name] for name in names}


def free_name(wanted: str, paths: Iterable[Path]) -> str:
    """`wanted`, or `wanted_2` ... when the root already has something of that name."""
    taken = {path[0] for path in paths}
    candidate, count = wanted, 1
    while candidate in taken:
        count += 1
        candidate = f"{wanted}_{count}"
    return candidate


def path_text(path: Path) -> str:
    """TorchScript text that reads the attribute at `path`."""
    text = "self"
    for part in path:
        text = f"{text}.{part}" if part.isidentifier() else f'getattr({text}, "{part}")'
    return text


def build_tree(program: Program, paths: Mapping[str, Path]) -> nn.Module:
    """The tree of boxes with the constants in `paths`: the Program's own tensors, copies only of state."""
    root = new_box("Model")
    boxes: dict[Path, nn.Module] = {(): root}
    for name, path in paths.items():
        for depth in range(1, len(path)):
            if path[:depth] not in boxes:
                boxes[path[:depth]] = Box()
                boxes[path[: depth - 1]].add_module(path[depth - 1], boxes[path[:depth]])
        tensor = program.constants[name]
        box, leaf = boxes[path[:-1]], path[-1]
        if name in program.state:
            box.register_buffer(leaf, tensor.clone())
        elif tensor.is_floating_point() or tensor.is_complex():
            box.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
        else:
            box.register_buffer(leaf, tensor)
    return root


def _legal(part: str) -> str:
    part = re.sub(r"[^0-9A-Za-z_]", "_", part) or "_"
    return f"{part}_" if part in _RESERVED or _OURS.fullmatch(part) else part
