"""Model files: an emitted module with its manifest and golden tensors, written atomically and read with clear errors.

A file is an ordinary TorchScript archive (a zip); `torch.jit.load` and libtorch read it. Extra files in it:

    extra/manifest.json       whatever the caller wants to remember, as JSON
    extra/golden_inputs.pt    the arguments of one call (tensors, or containers of them), as `torch.save` writes a list
    extra/golden_outputs.pt   what that call returned; with state in the model, the first call after loading

In C++, `torch::jit::pickle_load(bytes).toListRef()` gives the golden tensors.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.jit import ScriptModule

from ir_tools.emit.torch_jit import from_bytes, from_file, to_bytes, to_file
from ir_tools.errors import ModelFileError, first_line
from ir_tools.files import replacing
from ir_tools.torch_compat import pytree

MANIFEST = "manifest.json"
GOLDEN_INPUTS = "golden_inputs.pt"
GOLDEN_OUTPUTS = "golden_outputs.pt"

PathLike = str | os.PathLike[str]


def round_trip(scripted: ScriptModule) -> ScriptModule:
    """The module as a file would give it back: saved to memory and loaded. Shares no tensor with `scripted`."""
    return from_bytes(to_bytes(scripted)).eval()


def save(
    scripted: ScriptModule,
    path: PathLike,
    manifest: dict[str, Any],
    inputs: Sequence[Any],
    outputs: Sequence[torch.Tensor],
) -> None:
    """Write `scripted` to `path`, all or nothing: a failure leaves what was there before.

    `inputs` are the arguments of one call: tensors, and lists, tuples and dicts of tensors.

    Raises ModelFileError when the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    if os.path.isdir(target):
        raise ModelFileError(f"cannot write {path}: it is a directory; give the name of a file")
    if not os.path.isdir(target.parent):
        raise ModelFileError(f"cannot write {path}: the directory {target.parent} does not exist; make it first")
    extra_files = {
        MANIFEST: _manifest_text(path, manifest),
        GOLDEN_INPUTS: _tensor_bytes(inputs),
        GOLDEN_OUTPUTS: _tensor_bytes(outputs),
    }
    try:
        with replacing(target, flushed=True) as unfinished:
            to_file(scripted, str(unfinished), extra_files)
    except (OSError, RuntimeError) as error:
        raise ModelFileError(f"cannot write {path}: {first_line(error)}") from error


def load(path: PathLike) -> tuple[ScriptModule, dict[str, Any], list[Any], list[torch.Tensor]]:
    """(module, manifest, golden inputs, golden outputs) of a file that `save` wrote.

    Raises ModelFileError, saying what the file is, for any other file.
    """
    extra_files = _extra_files(path)
    missing = [name for name in (MANIFEST, GOLDEN_INPUTS, GOLDEN_OUTPUTS) if name not in extra_files]
    if missing:
        raise ModelFileError(
            f"{path} is a TorchScript file without {', '.join(missing)}: it was not saved by torch-passes. "
            "torch.jit.load reads it, and optimize() takes its path as a model"
        )
    try:
        manifest = json.loads(extra_files[MANIFEST])
        inputs, outputs = (
            torch.load(io.BytesIO(extra_files[name]), weights_only=True) for name in (GOLDEN_INPUTS, GOLDEN_OUTPUTS)
        )
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ModelFileError(f"{path} has a damaged manifest or golden tensors: {first_line(error)}") from error
    return _read(path), manifest, inputs, outputs


def read_torchscript(path: PathLike) -> tuple[ScriptModule, dict[str, Any] | None]:
    """(module, manifest) of any TorchScript file; the manifest is None when torch-passes did not write the file.

    Raises ModelFileError, saying what the file is, when it is not TorchScript. Nothing in such a file is unpickled.
    """
    text = _extra_files(path).get(MANIFEST)
    try:
        manifest = None if text is None else json.loads(text)
    except ValueError as error:
        raise ModelFileError(f"{path} has a damaged manifest: {first_line(error)}") from error
    return _read(path), manifest


# -- reading -----------------------------------------------------------------------------------------------------------


def _extra_files(path: PathLike) -> dict[str, bytes]:
    """The extra files of a TorchScript archive, after making sure that it is one."""
    if os.path.isdir(path):
        raise ModelFileError(f"{path} is a directory, not a model file")
    try:
        with open(path, "rb") as file:
            start = file.read(64)
            file.seek(0)
            if not zipfile.is_zipfile(file):
                raise ModelFileError(_describe_no_zip(path, start))
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                if names and min(entry.header_offset for entry in archive.infolist()) > 0:
                    # The end that was found is that of the golden tensors' own archives inside a file cut short.
                    raise ModelFileError(_describe_no_zip(path, start))
                _require_torchscript(path, names)
                wanted = {
                    inner: name
                    for name in names
                    for inner in (MANIFEST, GOLDEN_INPUTS, GOLDEN_OUTPUTS)
                    if _inside(name) == f"extra/{inner}"
                }
                return {inner: archive.read(name) for inner, name in wanted.items()}
    except FileNotFoundError:
        raise ModelFileError(f"there is no file {path}") from None
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"cannot read {path}: {first_line(error)}") from error


def _describe_no_zip(path: PathLike, start: bytes) -> str:
    if not start:
        return f"{path} is empty"
    if start[:2] == b"PK":
        return f"{path} is cut short or damaged: it starts as a zip archive but has no end; copy or save it again"
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return f"{path} is a Python pickle (an old torch.save file?), not TorchScript; {_HOW_TO_PASS_A_MODULE}"
    return f"{path} is not a TorchScript file (TorchScript files are zip archives)"


_HOW_TO_PASS_A_MODULE = (
    "it is not opened, because unpickling can run any code. Load it yourself, put its weights into the model, "
    "and pass the model"
)


def _require_torchscript(path: PathLike, names: list[str]) -> None:
    inside = {_inside(name) for name in names}
    if "constants.pkl" in inside and any(name.startswith("code/") for name in inside):
        return
    if any(name in inside for name in ("archive_format", "models/model.json", "serialized_exported_program.json")):
        raise ModelFileError(
            f"{path} was saved by torch.export, not as TorchScript; read it with torch.export.load and pass the result"
        )
    if "data.pkl" in inside:
        raise ModelFileError(f"{path} was pickled by torch.save, and is not TorchScript; {_HOW_TO_PASS_A_MODULE}")
    raise ModelFileError(f"{path} is a zip archive, but not a TorchScript file: it holds no code/ and constants.pkl")


def _inside(name: str) -> str:
    """A name in the archive without the archive's own folder."""
    return name.partition("/")[2]


def _read(path: PathLike) -> ScriptModule:
    try:
        return from_file(os.fspath(path)).eval()
    except torch.jit.Error as error:  # weights that this machine cannot pack
        raise ModelFileError(f"torch cannot read {path}: {first_line(error)}") from error
    except (RuntimeError, ValueError) as error:  # ValueError: torch's own message, when it quotes damaged text
        raise ModelFileError(f"torch cannot read {path}: {str(error).strip()}") from error


# -- writing -----------------------------------------------------------------------------------------------------------


def _manifest_text(path: PathLike, manifest: dict[str, Any]) -> str:
    try:
        return json.dumps(manifest, indent=2)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"cannot write {path}: the manifest is no JSON: {error}") from error


def _tensor_bytes(arguments: Sequence[Any]) -> bytes:
    buffer = io.BytesIO()
    # Clones, so that a view does not bring all of its storage into the file.
    torch.save(pytree.tree_map(lambda t: t.detach().clone(), list(arguments)), buffer)
    return buffer.getvalue()
