"""Prepacked constants: submodules that hold what prepack ops give, save plain constants, and prepack when they are loaded.

    packed      weights laid out for oneDNN. They are opaque and cannot be saved; `to_dense` gives back the plain weight bit
                for bit (a test holds this), so only the packed copy stays in memory
    prepared    what any other prepack op gives; the plain constants stay beside it, to be saved
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.jit import ScriptModule

from ir_tools.emit.calls import call_text
from ir_tools.emit.hoisting import Hoisted, operands_of
from ir_tools.emit.torch_jit import define, new_box
from ir_tools.errors import EmitError, first_line
from ir_tools.ir.dialect import short_name
from ir_tools.ir.prepack import prepack_of
from ir_tools.ir.program import Program

_PACKED_STATE = """\
def __getstate__(self) -> Tuple[List[Tensor], bool]:
    return [weight.to_dense() for weight in self.weights], self.training

def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:
    self.training = state[1]
    self._pack(state[0])
"""

_PREPARED_STATE = """\
def __getstate__(self) -> Tuple[List[Tensor], bool]:
    return self.plain, self.training

def __setstate__(self, state: Tuple[List[Tensor], bool]) -> None:
    self.training = state[1]
    self._pack(state[0])
"""

_NO_BFLOAT16 = (
    "this file holds bfloat16 weights packed for oneDNN, and this CPU lacks AVX-512, which that needs; "
    "optimise the model with engine='aten' to run it here"
)
_CHECK_CPU = f"""\
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise RuntimeError("{_NO_BFLOAT16}")
"""


def add_boxes(root: nn.Module, hoisted: Hoisted) -> None:
    """Give `root` the submodules for what is hoisted, with nothing in them yet."""
    # Lists, not parameters: `.to(dtype)` cannot convert opaque tensors, and passes a list by.
    if hoisted.packed:
        _add_box(root, hoisted.packed_name, "PackedWeights", ["weights"])
    if hoisted.prepared:
        _add_box(root, hoisted.prepared_name, "Prepared", ["plain", "results"])


def _add_box(root: nn.Module, name: str, kind: str, lists: Sequence[str]) -> None:
    box = new_box(kind)
    for attribute in lists:
        setattr(box, attribute, torch.jit.Attribute([], list[torch.Tensor]))
    root.add_module(name, box)


def attach_packing(scripted: ScriptModule, program: Program, hoisted: Hoisted, chunk_size: int) -> None:
    """Define how the submodules prepack and save, and prepack the constants of `program`."""
    if hoisted.packed:
        box = getattr(scripted, hoisted.packed_name)
        define(box, packing_text(program, hoisted.packed, chunk_size))
        try:
            box._pack([program.constants[_weight(node)] for node in hoisted.packed])
        except (RuntimeError, torch.jit.Error) as error:
            raise EmitError(f"a weight cannot be packed for oneDNN: {first_line(error)}") from error
    if hoisted.prepared:
        box = getattr(scripted, hoisted.prepared_name)
        names = ", ".join(sorted({short_name(node.target) for node in hoisted.prepared}))
        try:
            define(box, preparing_text(program, hoisted.prepared, chunk_size))
            box._pack(list(operands_of(program, hoisted.prepared).values()))
        except (RuntimeError, torch.jit.Error) as error:
            raise EmitError(f"constants cannot be prepared by {names}: {first_line(error)}") from error


def packing_text(program: Program, nodes: Sequence[fx.Node], chunk_size: int) -> str:
    """The methods of `packed`: `_pack` in parts of `chunk_size` weights, and saving and loading."""
    calls = [_call_text(program, node, {_weight(node): f"plain[{i}]"}) for i, node in enumerate(nodes)]
    halves = any(program.constants[_weight(node)].dtype == torch.bfloat16 for node in nodes)
    start = "    self.weights = []\n" + (_CHECK_CPU if halves else "")
    return _methods("weights", start, calls, chunk_size, _PACKED_STATE)


def preparing_text(program: Program, nodes: Sequence[fx.Node], chunk_size: int) -> str:
    """The methods of `prepared`."""
    plain = {name: f"plain[{i}]" for i, name in enumerate(operands_of(program, nodes))}
    calls = [_call_text(program, node, plain) for node in nodes]
    return _methods("results", "    self.plain = plain\n    self.results = []\n", calls, chunk_size, _PREPARED_STATE)


def _methods(attribute: str, start: str, calls: Sequence[str], chunk_size: int, state: str) -> str:
    parts, pack = [], [f"def _pack(self, plain: List[Tensor]) -> None:\n{start}"]
    for at in range(0, len(calls), chunk_size):
        part = f"_pack_{at // chunk_size}"
        lines = [f"    self.{attribute}.append({call})\n" for call in calls[at : at + chunk_size]]
        parts.append(f"def {part}(self, plain: List[Tensor]) -> None:\n" + "".join(lines))
        pack.append(f"    self.{part}(plain)\n")
    return "\n".join([*parts, "".join(pack), state])


def _weight(node: fx.Node) -> str:
    """The name of the one constant that a packed weight is made from."""
    return str(node.all_input_nodes[0].target)


class _Plain:
    """Reads constants as elements of the list that is packed, and prepack ops as calls."""

    def __init__(self, program: Program, texts: dict[str, str]):
        self.program = program
        self.texts = texts

    def read(self, node: fx.Node) -> str:
        return self.texts[str(node.target)] if node.op == "get_attr" else _call_text(self.program, node, self.texts)

    def held_float(self, value: float) -> str:
        raise EmitError(f"a prepack op cannot take the number {value}")


def _call_text(program: Program, node: fx.Node, texts: dict[str, str]) -> str:
    prepack = prepack_of(node)
    assert prepack is not None
    return call_text(node, prepack.kernel, _Plain(program, texts))
