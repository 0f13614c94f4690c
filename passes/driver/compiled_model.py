"""What `optimize` and `load` return: a model that is called like the user's own."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ir_tools.emit import package
from ir_tools.emit.calling import arguments_for, flat_outputs
from ir_tools.emit.torch_jit import ScriptModule
from ir_tools.files import write_atomically
from ir_tools.frontends.undisturbed import seeded
from ir_tools.ir import Program
from ir_tools.torch_compat import pytree
from ir_tools.verify.numerics import compare
from ir_tools.visualize import draw_svg, to_dot
from passes.driver.manifest import check_manifest, read_tree
from passes.errors import NumericsError, PassesError
from passes.lower.targets import registered_targets
from passes.report.report import Report


class OptimizedModel(nn.Module):
    """A compiled model with the call signature and output structure of the one given; inference only.

    - `scripted`: the TorchScript module, independent of the user's model (it has its own copy of every weight).
    - `program`: the final graph. `graph_module`: the same as an ordinary `fx.GraphModule` over flat tensors.
    - `report`: what was done. `dumps`: the drawings written.

    Calls are thread-safe as far as the model itself keeps no state.
    """

    def __init__(self, scripted: ScriptModule, program: Program, report: Report, dumps: Sequence[Path],
                 manifest: dict[str, Any], golden: tuple[list[Any], list[torch.Tensor]]):  # fmt: skip
        super().__init__()
        self.scripted = scripted
        self.program = program
        self.report = report
        self.dumps = list(dumps)
        self.manifest = manifest
        self._golden = golden
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        signature = self.program.signature
        if signature.is_plain and not kwargs and [type(a) for a in args] == [torch.Tensor] * len(signature.inputs):
            return self._run(args, args)
        tensors = signature.flatten(args, kwargs)
        result = self._run(arguments_for(signature, tensors), tensors)
        return signature.unflatten_outputs(flat_outputs(signature, result))

    def _run(self, arguments: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Any:
        try:
            return self.scripted(*arguments)
        except Exception:
            # The emitted module checks its inputs first of all; here its error gets its Python type.
            self.program.signature.check(tensors)
            raise

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        return self.program.graph_module()

    def train(self, mode: bool = True) -> OptimizedModel:
        if mode:
            raise PassesError("an optimised model is for inference: train the model you gave and optimise it again")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a TorchScript file, atomically, with the manifest and golden inputs and outputs inside.

        Raises `ModelFileError` when the path cannot be written.
        """
        inputs, outputs = self._golden
        if self.program.state:  # later calls have changed it, and the file holds its present value
            outputs = call_flat(self.scripted, inputs)
        package.save(self.scripted, path, self.manifest, inputs, outputs)

    def draw(self, path: str | os.PathLike[str]) -> str | None:
        """Draw the final graph: DOT text for `.dot`, else SVG. Returns None, or a line that says why there is no SVG."""
        text = to_dot(self.program, title="optimised")
        if str(path).endswith(".dot"):
            write_atomically(Path(path), text.encode())
            return None
        return draw_svg(text, Path(path))


class LoadedModel(nn.Module):
    """A saved model, called like the emitted TorchScript module; the user's output structure is restored."""

    def __init__(self, scripted: ScriptModule, manifest: dict[str, Any]):
        super().__init__()
        self.scripted = scripted
        self.manifest = manifest
        self._out_tree = read_tree(manifest.get("out_tree"))
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scripted(*args, **kwargs)
        if self.manifest["typed_outputs"] or self._out_tree is None:
            return result
        tensors = iter([result] if isinstance(result, torch.Tensor) else result)
        leaves = [next(tensors) if leaf == "tensor" else leaf["baked"] for leaf in self.manifest["out_leaves"]]
        return pytree.tree_unflatten(leaves, self._out_tree)

    @property
    def needs(self) -> str:
        """What the file needs to run, as its target stated it. Older files: as the target of that name here does."""
        stated = self.manifest.get("needs")
        named = [target.needs for target in registered_targets() if target.name == self.manifest["engine"]]
        return stated if isinstance(stated, str) else next(iter(named), "")

    def train(self, mode: bool = True) -> LoadedModel:
        if mode:
            raise PassesError("an optimised model is for inference")
        return self


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Read a file that `OptimizedModel.save` wrote and check that it still gives its golden outputs.

    Raises `ModelFileError` for a file that is not one of ours, `NumericsError` when the numbers differ on this machine.

    >>> model = load("model.pt")                                # doctest: +SKIP
    >>> y = model(torch.randn(1, 3, 224, 224))                  # doctest: +SKIP
    """
    scripted, manifest, inputs, expected = package.load(path)
    check_manifest(path, manifest, inputs, expected)
    with torch.no_grad():
        outputs = call_flat(scripted, inputs)
    comparison = compare(expected, outputs)
    if comparison.problem or comparison.sqnr_db < manifest["golden_sqnr_db"]:
        raise NumericsError(
            f"{path} does not give its golden outputs on this machine: SQNR {comparison.sqnr_db:.1f} dB, expected at least "
            f"{manifest['golden_sqnr_db']:g} dB. {comparison.problem}".rstrip()
        )
    return LoadedModel(scripted, manifest)


def call_flat(scripted: ScriptModule, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that an emitted module returns on copies of its arguments; its state is put back afterwards."""
    with torch.no_grad(), seeded():
        state = [(b, b.clone()) for b in scripted.buffers()]
        result = scripted(*pytree.tree_map_only(torch.Tensor, torch.clone, list(arguments)))
        tensors = [t.clone() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        for buffer, value in state:
            buffer.copy_(value)
    return tensors
