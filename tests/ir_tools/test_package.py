"""Model files: all or nothing when written, and a clear word about anything else when read."""

import io
import os
import pickle
import stat
import subprocess
import sys
import zipfile

import pytest
import torch

from ir_tools import files
from ir_tools.emit import package
from ir_tools.emit.package import load, read_torchscript, round_trip, save
from ir_tools.emit.to_torchscript import emit
from ir_tools.errors import ModelFileError
from tests.ir_tools.emitting import aten, build

MANIFEST = {"passes": ["fold"], "sqnr": float("inf"), "é": None}


@pytest.fixture
def module():
    x = torch.randn(2, 3)
    return emit(build({"x": x}, lambda d, x: d.call(aten.linear.default, x, d.constant("w", torch.randn(4, 3)), None)))


@pytest.fixture
def saved(module, tmp_path):
    path = tmp_path / "model.pt"
    x = torch.randn(2, 3)
    save(module, path, MANIFEST, [x], [module(x)])
    return path


def other_module():
    return emit(build({"x": torch.randn(2, 3)}, lambda d, x: d.call(aten.relu.default, x)))


# -- round trips -------------------------------------------------------------------------------------------------------


def test_a_file_gives_back_everything(module, saved):
    loaded, manifest, inputs, outputs = load(saved)
    assert manifest == MANIFEST
    assert len(inputs) == len(outputs) == 1 and torch.equal(loaded(inputs[0]), outputs[0])
    assert not loaded.training and loaded.state_dict().keys() == {"w"}
    assert os.listdir(saved.parent) == ["model.pt"]


def test_a_file_is_plain_torchscript_for_another_process(saved):
    script = (
        "import sys, io, torch\n"
        "extra = {'manifest.json': '', 'golden_inputs.pt': '', 'golden_outputs.pt': ''}\n"
        "module = torch.jit.load(sys.argv[1], _extra_files=extra)\n"
        "names = ('golden_inputs.pt', 'golden_outputs.pt')\n"
        "ins, outs = (torch.load(io.BytesIO(extra[n]), weights_only=True) for n in names)\n"
        "assert torch.equal(module(*ins), outs[0]) and b'passes' in extra['manifest.json']\n"
        "assert not [m for m in sys.modules if m.startswith(('ir_tools', 'passes'))]\n"
    )
    done = subprocess.run([sys.executable, "-c", script, saved], cwd=saved.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_round_trip_shares_no_memory(module):
    copy = round_trip(module)
    x = torch.randn(2, 3)
    before = module(x)
    copy.w.zero_()
    assert torch.equal(module(x), before) and not copy(x).any()


def test_golden_views_do_not_bring_their_storage_along(module, tmp_path):
    big = torch.randn(1000, 1000)
    save(module, tmp_path / "model.pt", {}, [big[:2, :3]], [big[0]])
    assert (tmp_path / "model.pt").stat().st_size < 100_000


def test_read_torchscript(module, saved, tmp_path):
    loaded, manifest = read_torchscript(saved)
    assert manifest == MANIFEST and torch.equal(loaded.w, module.w)
    module.save(str(tmp_path / "plain.pt"))
    loaded, manifest = read_torchscript(str(tmp_path / "plain.pt"))
    assert manifest is None and torch.equal(loaded.w, module.w)
    with pytest.raises(ModelFileError, match=r"without manifest.json.*not saved by torch-passes"):
        load(tmp_path / "plain.pt")


# -- writing is all or nothing -----------------------------------------------------------------------------------------


def test_a_new_file_replaces_the_old_one_with_ordinary_permissions(saved):
    save(other_module(), saved, {"second": True}, [], [])
    assert load(saved)[1] == {"second": True}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


def test_a_link_is_written_through(saved, tmp_path):
    link = tmp_path / "link.pt"
    link.symlink_to(saved)
    save(other_module(), link, {"second": True}, [], [])
    assert link.is_symlink() and load(saved)[1] == {"second": True}


@pytest.mark.parametrize("step", ["to_file", "_flush", "replace"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("writer failed"), KeyboardInterrupt()]
)
def test_a_failure_leaves_the_old_file_and_nothing_else(saved, monkeypatch, step, error):
    before = saved.read_bytes()

    def fail(*args, **kwargs):
        if step == "to_file":
            with open(args[1], "wb") as half:
                half.write(b"half of a file")
        raise error

    owner = {"to_file": package, "_flush": files, "replace": files.os}[step]
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else ModelFileError):
        save(other_module(), saved, {}, [], [])
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["model.pt"]


def test_where_nothing_can_be_written(module, tmp_path):
    with pytest.raises(ModelFileError, match=r"the directory .*absent does not exist"):
        save(module, tmp_path / "absent" / "model.pt", {}, [], [])
    with pytest.raises(ModelFileError, match="is a directory"):
        save(module, tmp_path, {}, [], [])
    with pytest.raises(ModelFileError, match="the manifest is no JSON"):
        save(module, tmp_path / "model.pt", {"tensor": torch.zeros(1)}, [], [])
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(module, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ModelFileError, match=r"cannot write .*Permission denied"):
        save(module, tmp_path / "model.pt", {}, [], [])


# -- reading anything else ---------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling this makes a directory."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def write_torch_save(path):
    torch.save({"model": Bomb()}, path)


def write_legacy_torch_save(path):
    torch.save(Bomb(), path, _use_new_zipfile_serialization=False)


def write_pickle(path):
    path.write_bytes(pickle.dumps(Bomb()))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_export(path):
    class Relu(torch.nn.Module):
        def forward(self, x):
            return x.relu()

    torch.export.save(torch.export.export(Relu(), (torch.randn(2),)), path)


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"hello"), "is not a TorchScript file"),
        (write_torch_save, r"was pickled by torch.save.*not opened.*pass the model"),
        (write_legacy_torch_save, r"is a Python pickle \(an old torch.save file\?\).*not opened"),
        (write_pickle, "is a Python pickle"),
        (write_zip, "is a zip archive, but not a TorchScript file"),
        (write_export, r"was saved by torch.export.*torch.export.load"),
    ],
)
@pytest.mark.parametrize("read", [load, read_torchscript])
def test_what_is_no_torchscript_file_is_reported(tmp_path, monkeypatch, write, message, read):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pt2"
    write(path)
    with pytest.raises(ModelFileError, match=message):
        read(path)
    with pytest.raises(ModelFileError, match=message):
        read(str(path))
    assert not os.path.exists("unpickled")


@pytest.mark.parametrize("read", [load, read_torchscript])
def test_a_file_cut_short_anywhere(saved, read):
    whole = saved.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match="is cut short or damaged"):
            read(saved)


def test_a_file_with_damaged_bytes_inside(saved):
    whole = saved.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        inner = {name: archive.getinfo(name).header_offset for name in archive.namelist()}
    for name, offset in inner.items():
        if name.endswith(("data.pkl", ".py", "manifest.json", "golden_inputs.pt")):
            damaged = bytearray(whole)
            start = whole.index(name.encode(), offset) + len(name) + 80
            damaged[start : start + 40] = bytes(b ^ 0xFF for b in damaged[start : start + 40])
            saved.write_bytes(damaged)
            with pytest.raises(ModelFileError, match=r"model\.pt"):
                load(saved)


def test_a_damaged_manifest(module, tmp_path):
    path = tmp_path / "model.pt"
    module._c.save(str(path), _extra_files={"manifest.json": "{", "golden_inputs.pt": "x", "golden_outputs.pt": "x"})
    for read in (load, read_torchscript):
        with pytest.raises(ModelFileError, match="damaged manifest"):
            read(path)
