"""Files that are no model, are cut or changed, or cannot be written get one clear error, and leave nothing half-written."""

from __future__ import annotations

import os
import pickle
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ir_tools.torch_compat import pytree
from passes import CaptureError, ModelFileError, NumericsError, OptionError, PassesError, load, optimize
from tests.models import Linear, row
from tests.passes.driver.bad_input import Runs, model, says

# -- files that are read -----------------------------------------------------------------------------------------------


class LeavesATrace:
    """Unpickling this writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def a_file(kind: str, path: Path, trace: Path) -> None:
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("model: resnet50\n")
    elif kind == "torch.save":
        torch.save({"payload": LeavesATrace(trace), "model": model()}, path)
    elif kind == "old torch.save":
        torch.save(LeavesATrace(trace), path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(LeavesATrace(trace)))
    elif kind == "torch.export.save":
        torch.export.save(torch.export.export(model(), (row(),)), path)
    elif kind == "truncated":
        whole = path.with_suffix(".whole")
        optimize(model(), example_inputs=row()).save(whole)
        path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.7)])
    elif kind == "damaged":
        whole = path.with_suffix(".whole")
        optimize(model(), example_inputs=row()).save(whole)
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for entry in old.infolist():
                data = old.read(entry)
                new.writestr(entry, data.replace(b"def forward", b"def (orward") if entry.filename.endswith(".py") else data)
    elif kind == "directory":
        path.mkdir()


FILES = {
    "missing": says("there is no file"),
    "empty": says("is empty"),
    "text": says("is not a TorchScript file"),
    "torch.save": says("was pickled by torch.save", "not opened, because unpickling can run any code", "pass the model"),
    "old torch.save": says("is a Python pickle (an old torch.save file?), not TorchScript", "not opened"),
    "pickle": says("is a Python pickle", "not opened"),
    "torch.export.save": says("was saved by torch.export", "torch.export.load and pass the result"),
    "truncated": says("is cut short or damaged", "copy or save it again"),
    "directory": says("is a directory"),
    "damaged": says("torch cannot read"),
}


def optimize_file(path: Any) -> Any:
    return optimize(path, example_inputs=row())


@pytest.mark.parametrize("read", [optimize_file, lambda path: optimize_file(str(path)), load], ids=["path", "text", "load"])
@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_model(kind, read, tmp_path):
    path, trace = tmp_path / "given.pt", tmp_path / "trace"
    a_file(kind, path, trace)
    with pytest.raises(ModelFileError, match=FILES[kind]) as error:
        read(path)
    assert str(path) in str(error.value)
    assert not trace.exists(), "the file was unpickled"


def test_the_payload_would_leave_a_trace(tmp_path):
    """The check above has teeth: unpickling these files does write the trace."""
    for kind in ("torch.save", "old torch.save", "pickle"):
        path, trace = tmp_path / f"{kind}.pt", tmp_path / f"{kind}.trace"
        a_file(kind, path, trace)
        if kind == "pickle":
            pickle.loads(path.read_bytes())
        else:
            torch.load(path, weights_only=False)
        assert trace.exists()


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.5, 0.9, 0.99, -1])
def test_a_file_cut_anywhere_is_said_to_be_cut(cut, tmp_path):
    whole, path = tmp_path / "whole.pt", tmp_path / "cut.pt"
    optimize(model(), example_inputs=row()).save(whole)
    size = whole.stat().st_size
    path.write_bytes(whole.read_bytes()[: int(size * cut) if cut > 0 else size - 1])
    for read in (load, optimize_file):
        with pytest.raises(ModelFileError, match="cut short or damaged"):
            read(path)


def test_somebody_elses_torchscript_is_a_model_and_not_a_result(tmp_path):
    path = tmp_path / "theirs.pt"
    torch.jit.script(model()).save(path)
    with pytest.raises(ModelFileError, match=says("was not saved by torch-passes", "torch.jit.load reads it")):
        load(path)
    assert optimize(path, example_inputs=row())(row()).shape == (2, 4)


def test_a_file_whose_numbers_are_not_its_golden_ones(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    inputs, outputs = fast._golden
    fast._golden = inputs, [t + 1 for t in outputs]
    fast.save(path)
    message = says("does not give its golden outputs on this machine: SQNR", "expected at least 60 dB")
    with pytest.raises(NumericsError, match=message):
        load(path)


def test_a_half_precision_file_is_held_to_its_own_outputs(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), "cast_half", example_inputs=row())
    inputs, outputs = fast._golden
    fast.save(path)
    load(path)
    fast._golden = inputs, [t * 1.2 for t in outputs]  # 16 dB
    fast.save(path)
    with pytest.raises(NumericsError, match="expected at least 20 dB"):
        load(path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("format", 99, says("has format 99, and this version reads 1")),
        ("format", None, says("has format None")),
        ("golden_sqnr_db", "80", says("damaged manifest: golden_sqnr_db must be int or float, got '80'")),
        ("golden_sqnr_db", float("nan"), says("damaged manifest: golden_sqnr_db is nan")),
        ("typed_outputs", "yes", says("damaged manifest: typed_outputs must be bool, got 'yes'")),
        ("out_tree", 3, says("damaged manifest: out_tree must be str or NoneType, got 3")),
        ("out_leaves", None, says("damaged manifest: out_leaves must be list, got None")),
        ("out_leaves", ["tensor", {}], says("damaged manifest: out_leaves are")),
        ("out_leaves", ["tensor", "tensor"], says("damaged manifest: out_leaves do not fit")),
        ("out_leaves", ["tensor", {"baked": 1}], says("damaged manifest: out_leaves do not fit")),
    ],
)
def test_a_manifest_that_was_changed(key, value, message, tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    fast.manifest[key] = value
    fast.save(path)
    with pytest.raises(ModelFileError, match=message):
        load(path)
    del fast.manifest[key]
    fast.save(path)
    with pytest.raises(ModelFileError):
        load(path)


def test_a_manifest_that_is_no_manifest(tmp_path):
    path = tmp_path / "model.pt"
    fast = optimize(model(), example_inputs=row())
    fast.manifest = None
    fast.save(path)
    with pytest.raises(ModelFileError, match="has no torch-passes manifest"):
        load(path)


class ReturnsDtype(Linear):
    def forward(self, x):
        y = self.linear(x)
        return {"y": y, "dtype": y.dtype}


def test_a_file_that_cannot_record_the_structure_gives_flat_tensors(tmp_path):
    path = tmp_path / "model.pt"
    given = ReturnsDtype().eval()
    fast = optimize(given, example_inputs=row(), frontend="trace")
    assert fast(row())["dtype"] is torch.float32
    fast.save(path)
    loaded, x = load(path), row()
    assert loaded.manifest["out_tree"] is None
    torch.testing.assert_close(pytree.tree_leaves(loaded(x)), [given(x)["y"]])


def test_a_result_is_no_model_to_optimise_again(tmp_path):
    """oneDNN's kernels are past rewriting."""
    path = tmp_path / "fast.pt"
    optimize(model(), ["lower_onednn:variant=fused"], example_inputs=row()).save(path)
    with pytest.raises(CaptureError, match=says("it was optimised already; pass the original model")):
        optimize(path, example_inputs=row())
    optimize(model(), example_inputs=row(), engine="aten").save(path)
    assert optimize(path, example_inputs=row())(row()).shape == (2, 4)


# -- files that are written --------------------------------------------------------------------------------------------

as_root = os.geteuid() == 0


@pytest.fixture(scope="module")
def fast():
    return optimize(model(), example_inputs=row())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "name, message",
    [
        ("missing/model.pt", says("cannot write", "the directory", "does not exist; make it first")),
        ("folder", says("cannot write", "it is a directory; give the name of a file")),
        ("old.pt/model.pt", says("cannot write")),
        ("n" * 300 + ".pt", says("cannot write")),
    ],
)
def test_a_path_that_cannot_be_written_leaves_everything_as_it_was(fast, name, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.pt").write_bytes(b"old")
    before = contents(tmp_path)
    with pytest.raises(ModelFileError, match=message):
        fast.save(tmp_path / name)
    assert contents(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "old.pt"]


def test_a_failure_in_the_middle_of_writing_leaves_the_old_file(fast, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    from ir_tools.emit import package

    def half(scripted: Any, target: str, extra: Any) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(package, "to_file", half)
    with pytest.raises(ModelFileError, match=says("cannot write", "No space left on device")):
        fast.save(path)
    assert contents(tmp_path) == {"model.pt": b"old"} and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(as_root, reason="root may write anywhere; the file system cannot refuse it")
def test_a_folder_without_permission(fast, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(ModelFileError, match=says("cannot write", "Permission denied")):
        fast.save(locked / "model.pt")
    with pytest.raises(OptionError, match=says("dump_dir", "cannot be written")):
        optimize(model(), example_inputs=row(), dump_dir=locked)


def test_a_save_over_an_old_file_replaces_it_whole(fast, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"old")
    fast.save(path)
    assert load(path)(row()).shape == (2, 4)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_dump_dir_that_cannot_be_written_is_said_before_any_work(name, tmp_path):
    (tmp_path / "file").write_text("a file")
    ran = []

    class Watched(Runs):
        def forward(self, x):
            ran.append(x)
            return super().forward(x)

    with pytest.raises(OptionError, match=says("dump_dir", str(tmp_path / name), "cannot be written: ")):
        optimize(Watched().eval(), example_inputs=row(), dump_dir=tmp_path / name)
    assert not ran
    assert contents(tmp_path) == {"file": b"a file"}


def test_the_result_cannot_be_trained(fast):
    with pytest.raises(PassesError, match="an optimised model is for inference: train the model you gave"):
        fast.train()
    assert not fast.training and fast.eval() is fast
