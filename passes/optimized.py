"""What `optimize` gives back, and what `load` reads: a model that is called like the user's own."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ir_tools.emit import package
from ir_tools.emit.calling import arguments_for, flat_outputs, typed_outputs
from ir_tools.emit.torch_jit import ScriptModule
from ir_tools.frontends.source import seeded
from ir_tools.ir import Program, Signature
from ir_tools.torch_compat import pytree
from ir_tools.verify.numerics import compare
from ir_tools.visualize.to_dot import draw_svg, to_dot, write_whole
from passes.errors import ModelFileError, NumericsError, PassesError
from passes.report import Report

FORMAT = 1
MANIFEST: dict[str, tuple[type, ...]] = {
    "torch": (str,),
    "torch_passes": (str,),
    "frontend": (str,),
    "engine": (str,),
    "passes": (list,),
    "inputs": (list,),
    "typed_outputs": (bool,),
    "out_tree": (str, type(None)),
    "out_leaves": (list,),
    "verified": (bool,),
    "golden_sqnr_db": (int, float),
}
"""What a manifest of this format must hold, by type."""


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
        if self.program.state:  # calls since then have moved it, and the file holds it as it is now
            outputs = call_flat(self.scripted, inputs)
        package.save(self.scripted, path, self.manifest, inputs, outputs)

    def draw(self, path: str | os.PathLike[str]) -> str | None:
        """Draw the final graph: DOT text for `.dot`, else SVG. Returns None, or a line that says why there is no SVG."""
        text = to_dot(self.program, title="optimised")
        if str(path).endswith(".dot"):
            write_whole(Path(path), text.encode())
            return None
        return draw_svg(text, Path(path))


class LoadedModel(nn.Module):
    """A saved model, called like the emitted TorchScript module; the user's output structure is restored."""

    def __init__(self, scripted: ScriptModule, manifest: dict[str, Any]):
        super().__init__()
        self.scripted = scripted
        self.manifest = manifest
        self._out_tree = _read_tree(manifest.get("out_tree"))
        super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.scripted(*args, **kwargs)
        if self.manifest["typed_outputs"] or self._out_tree is None:
            return result
        tensors = iter([result] if isinstance(result, torch.Tensor) else result)
        leaves = [next(tensors) if leaf == "tensor" else leaf["baked"] for leaf in self.manifest["out_leaves"]]
        return pytree.tree_unflatten(leaves, self._out_tree)

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
    _check_manifest(path, manifest, inputs, expected)
    with torch.no_grad():
        outputs = call_flat(scripted, inputs)
    comparison = compare(expected, outputs)
    if comparison.problem or comparison.sqnr_db < manifest["golden_sqnr_db"]:
        raise NumericsError(
            f"{path} does not give its golden outputs on this machine: SQNR {comparison.sqnr_db:.1f} dB, expected at least "
            f"{manifest['golden_sqnr_db']:g} dB. {comparison.problem}".rstrip()
        )
    return LoadedModel(scripted, manifest)


def _check_manifest(path: str | os.PathLike[str], manifest: Any, inputs: Any, outputs: Any) -> None:
    """Raise `ModelFileError` for a manifest or golden tensors that `save` would not write."""
    if not isinstance(manifest, dict) or "golden_sqnr_db" not in manifest:
        raise ModelFileError(f"{path} has no torch-passes manifest; load it with torch.jit.load")
    if manifest.get("format") != FORMAT:
        raise ModelFileError(f"{path} has format {manifest.get('format')!r}, and this version reads {FORMAT}; save it again")
    for key, types in MANIFEST.items():
        if key not in manifest or type(manifest[key]) not in types:
            names = " or ".join(t.__name__ for t in types)
            raise ModelFileError(f"{path} has a damaged manifest: {key} must be {names}, got {manifest.get(key)!r}")
    if not math.isfinite(manifest["golden_sqnr_db"]):
        raise ModelFileError(f"{path} has a damaged manifest: golden_sqnr_db is {manifest['golden_sqnr_db']}")
    leaves, tree = manifest["out_leaves"], _read_tree(manifest["out_tree"])
    if any(leaf != "tensor" and not (isinstance(leaf, dict) and "baked" in leaf) for leaf in leaves):
        raise ModelFileError(f'{path} has a damaged manifest: out_leaves are "tensor" or {{"baked": value}}, got {leaves!r}')
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not all(isinstance(t, torch.Tensor) for t in outputs):
        raise ModelFileError(f"{path} has damaged golden tensors: they are two lists, of arguments and of output tensors")
    if leaves.count("tensor") != len(outputs) or (tree is not None and tree.num_leaves != len(leaves)):
        raise ModelFileError(f"{path} has a damaged manifest: out_leaves do not fit out_tree and the golden outputs")


def call_flat(scripted: ScriptModule, arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that an emitted module returns on copies of its arguments; its state is put back afterwards."""
    with torch.no_grad(), seeded():
        state = [(b, b.clone()) for b in scripted.buffers()]
        result = scripted(*pytree.tree_map_only(torch.Tensor, torch.clone, list(arguments)))
        tensors = [t.clone() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        for buffer, value in state:
            buffer.copy_(value)
    return tensors


def build_manifest(program: Program, report: Report, golden_sqnr_db: float) -> dict[str, Any]:
    """What a file says about itself: versions, passes, signature, baked sizes, numbers."""
    signature = program.signature
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "torch_passes": version(),
        "frontend": report.frontend,
        "engine": report.engine,
        "passes": [step.name for step in report.steps if not step.reverted],
        "choices": report.choices.to_dict() if report.choices is not None else None,
        "speed": report.to_dict()["speed"],
        "inputs": [
            {
                "name": i.name,
                "shape": [size if isinstance(size, int) else size.name for size in i.shape],
                "dtype": str(i.dtype).removeprefix("torch."),
            }
            for i in signature.inputs
        ],
        "typed_outputs": typed_outputs(signature),
        "out_tree": _write_tree(signature),
        "out_leaves": ["tensor" if isinstance(leaf, int) else {"baked": _plain(leaf.value)} for leaf in signature.out_leaves],
        "verified": report.verified,
        "sqnr_db": report.to_dict()["sqnr_db"],
        "max_abs_error": report.max_abs_error,
        "golden_sqnr_db": golden_sqnr_db,
    }


def version() -> str:
    """The version of the installed distribution, "unknown" when run from a bare checkout."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("torch-passes")
    except PackageNotFoundError:
        return "unknown"


def _is_plain(value: Any) -> bool:
    return type(value) in (type(None), bool, int, float, str)  # what JSON gives back as it was; an IntEnum is not


def _plain(value: Any) -> Any:
    return value if _is_plain(value) else repr(value)


def _write_tree(signature: Signature) -> str | None:
    """The output structure as text; None where a file cannot tell it, and gives flat tensors."""
    if not all(isinstance(leaf, int) or _is_plain(leaf.value) for leaf in signature.out_leaves):
        return None
    try:
        return pytree.treespec_dumps(signature.out_tree)
    except Exception:  # an output class that registers no serialisation: the file gives flat tensors then
        return None


def _read_tree(text: str | None) -> pytree.TreeSpec | None:
    try:
        return pytree.treespec_loads(text) if text is not None else None
    except Exception:  # the output class is not importable here: give flat tensors
        return None
