"""Weights laid out for oneDNN: a submodule that holds them packed, saves them plain, and packs them when it is loaded.

A packed tensor is opaque and cannot be saved. `to_dense` gives back the plain weight bit for bit (a test holds this),
so only the packed copy stays in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.jit import ScriptModule

from ir_tools.emit.torch_jit import define, new_box
from ir_tools.errors import EmitError, first_line
from ir_tools.ir.program import Packing, Program

_STATE = """\
def __getstate__(self) -> Tuple[List[Tensor], bool]:
    return [weight.to_dense() for weight in self.weights], self.training

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


def add_packed_weights(root: nn.Module, name: str) -> None:
    """Give `root` the submodule `name` with no weights in it yet."""
    box = new_box("PackedWeights")
    # A list, not parameters: `.to(dtype)` cannot convert opaque tensors, and passes a list by.
    setattr(box, "weights", torch.jit.Attribute([], list[torch.Tensor]))  # noqa: B010 - mypy takes it for a tensor
    root.add_module(name, box)


def attach_packing(packed: ScriptModule, program: Program, names: Sequence[str], chunk_size: int) -> None:
    """Define how `packed` packs and saves its weights, and pack those of `program`."""
    define(packed, packing_text(program, names, chunk_size))
    try:
        packed._pack([program.constants[name] for name in names])
    except (RuntimeError, torch.jit.Error) as error:
        raise EmitError(f"a weight cannot be packed for oneDNN: {first_line(error)}") from error


def packing_text(program: Program, names: Sequence[str], chunk_size: int) -> str:
    """The methods of the submodule: `_pack` in parts of `chunk_size` weights, and saving and loading."""
    parts, pack = [], ["def _pack(self, plain: List[Tensor]) -> None:\n    self.weights = []\n"]
    if any(program.constants[name].dtype == torch.bfloat16 for name in names):
        pack.append(_CHECK_CPU)
    for start in range(0, len(names), chunk_size):
        part = f"_pack_{start // chunk_size}"
        lines = [f"def {part}(self, plain: List[Tensor]) -> None:\n"]
        for i, name in enumerate(names[start : start + chunk_size], start):
            lines.append(f"    self.weights.append({_packing_call(program.packings[name], f'plain[{i}]')})\n")
        parts.append("".join(lines))
        pack.append(f"    self.{part}(plain)\n")
    return "\n".join([*parts, "".join(pack), _STATE])


def _packing_call(packing: Packing, weight: str) -> str:
    if packing.kind == "linear":
        return f"torch.ops.mkldnn._reorder_linear_weight({weight}, {packing.batch})"
    if packing.kind != "conv":
        raise EmitError(f"there is no packing of kind {packing.kind!r}")
    size = None if packing.input_size is None else list(packing.input_size)
    numbers = ", ".join(str(list(v)) for v in (packing.padding, packing.stride, packing.dilation))
    return f"torch.ops.mkldnn._reorder_convolution_weight({weight}, {numbers}, {packing.groups}, {size})"
