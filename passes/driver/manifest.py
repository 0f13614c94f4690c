"""The manifest of a saved file, its metadata: written by `OptimizedModel.save`, checked by `load`."""

from __future__ import annotations

import math
import os
from typing import Any

import torch

from ir_tools.emit.calling import typed_outputs
from ir_tools.ir import Program, Signature
from ir_tools.torch_compat import pytree
from passes.errors import ModelFileError
from passes.report.report import Report
from passes.version import installed_version

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


def check_manifest(path: str | os.PathLike[str], manifest: Any, inputs: Any, outputs: Any) -> None:
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
    leaves, tree = manifest["out_leaves"], read_tree(manifest["out_tree"])
    if any(leaf != "tensor" and not (isinstance(leaf, dict) and "baked" in leaf) for leaf in leaves):
        raise ModelFileError(f'{path} has a damaged manifest: out_leaves are "tensor" or {{"baked": value}}, got {leaves!r}')
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not all(isinstance(t, torch.Tensor) for t in outputs):
        raise ModelFileError(f"{path} has damaged golden tensors: they are two lists, of arguments and of output tensors")
    if leaves.count("tensor") != len(outputs) or (tree is not None and tree.num_leaves != len(leaves)):
        raise ModelFileError(f"{path} has a damaged manifest: out_leaves do not fit out_tree and the golden outputs")


def build_manifest(program: Program, report: Report, golden_sqnr_db: float, needs: str) -> dict[str, Any]:
    """The metadata of a file: versions, passes, signature, baked sizes, numbers."""
    signature = program.signature
    return {
        "format": FORMAT,
        "torch": torch.__version__,
        "torch_passes": installed_version(),
        "frontend": report.frontend,
        "engine": report.engine,
        "needs": needs,
        "passes": [step.name for step in report.steps if not step.reverted],
        "choices": report.tuning_records.to_dict() if report.tuning_records is not None else None,
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


def _is_plain(value: Any) -> bool:
    return type(value) in (type(None), bool, int, float, str)  # what JSON gives back as it was; an IntEnum is not


def _plain(value: Any) -> Any:
    return value if _is_plain(value) else repr(value)


def _write_tree(signature: Signature) -> str | None:
    """The output structure as text; None where JSON cannot hold it: the file then returns flat tensors."""
    if not all(isinstance(leaf, int) or _is_plain(leaf.value) for leaf in signature.out_leaves):
        return None
    try:
        return pytree.treespec_dumps(signature.out_tree)
    except Exception:  # an output class that registers no serialisation: the file gives flat tensors then
        return None


def read_tree(text: str | None) -> pytree.TreeSpec | None:
    try:
        return pytree.treespec_loads(text) if text is not None else None
    except Exception:  # the output class is not importable here: give flat tensors
        return None
