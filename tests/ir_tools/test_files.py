"""Writing files: complete or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ir_tools import files
from ir_tools.files import replacing, write_atomically

FAILURES = [OSError(28, "No space left on device"), RuntimeError("the writer failed"), KeyboardInterrupt()]
as_root = os.geteuid() == 0


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "graph.dot"
    path.write_bytes(b"old")
    return path


def test_the_new_content_replaces_the_old_and_nothing_else_stays(old: Path) -> None:
    write_atomically(old, b"new")
    assert old.read_bytes() == b"new"
    write_atomically(old.with_name("other"), b"")
    assert sorted(os.listdir(old.parent)) == ["graph.dot", "other"]


def test_a_relative_path_is_one_of_the_working_directory(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(old.parent)
    write_atomically(Path("graph.dot"), b"new")
    assert old.read_bytes() == b"new" and os.listdir() == ["graph.dot"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_everybody_may_read_what_was_written_whatever_the_umask_and_the_old_file(old: Path, umask: int) -> None:
    old.chmod(0o600)
    before = os.umask(umask)
    try:
        write_atomically(old, b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(old.stat().st_mode) == 0o644


def test_the_new_file_has_the_permissions_that_its_writer_gave(old: Path) -> None:
    with replacing(old) as unfinished:
        unfinished.write_bytes(b"new")
        unfinished.chmod(0o640)
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_the_unfinished_file_has_the_same_name_and_lies_on_the_same_disk(old: Path) -> None:
    with replacing(old) as unfinished:
        assert unfinished.name == old.name and unfinished.parent.parent == old.parent
        unfinished.write_bytes(b"half")
        assert old.read_bytes() == b"old"


@pytest.mark.parametrize("error", FAILURES, ids=repr)
def test_a_crash_in_the_middle_leaves_the_old_file_and_nothing_else(old: Path, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, replacing(old) as unfinished:
        unfinished.write_bytes(b"half")
        raise error
    assert raised.value is error
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["graph.dot"]


@pytest.mark.parametrize("error", FAILURES, ids=repr)
@pytest.mark.parametrize("step", ["chmod", "replace"])
def test_a_failing_step_leaves_the_old_file_and_nothing_else(
    old: Path, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(type(error)):
        write_atomically(old, b"new")
    monkeypatch.undo()
    assert old.read_bytes() == b"old" and os.listdir(old.parent) == ["graph.dot"]


@pytest.mark.parametrize("flushed", [False, True])
def test_only_what_asks_for_it_is_flushed_before_it_replaces_and_after(
    old: Path, flushed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: (order.append("sync"), sync(descriptor)))
    monkeypatch.setattr(files.os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    with replacing(old, flushed=flushed) as unfinished:
        unfinished.write_bytes(b"new")
    assert order == (["sync", "replace", "sync"] if flushed else ["replace"])
    assert old.read_bytes() == b"new"


def test_a_missing_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "graph.dot", b"new")
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_a_file_is_an_error_of_the_system(old: Path) -> None:
    with pytest.raises(NotADirectoryError):
        write_atomically(old / "graph.dot", b"new")
    assert old.read_bytes() == b"old"


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "taken", b"new")
    assert os.listdir(tmp_path) == ["taken"] and not os.listdir(tmp_path / "taken")


@pytest.mark.skipif(as_root, reason="root may write anywhere")
def test_a_folder_without_permission_is_an_error_of_the_system(old: Path) -> None:
    old.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_atomically(old, b"new")
    finally:
        old.parent.chmod(0o700)
    assert old.read_bytes() == b"old"


def test_a_link_itself_is_replaced(old: Path) -> None:
    """Whoever wants to write through it gives the path that it leads to."""
    link = old.with_name("link.dot")
    link.symlink_to(old)
    write_atomically(link, b"new")
    assert not link.is_symlink() and link.read_bytes() == b"new" and old.read_bytes() == b"old"
