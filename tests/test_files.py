"""support/files.py: files written whole or not at all, folders that can be written to, hashes."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support import files
from support.cli import BadInput
from support.files import (
    atomic_write,
    check_readable,
    check_writable,
    expand,
    files_in,
    save_tensors,
    sha256,
    sync,
    writable_folder,
    write_json,
    write_text,
)

not_root = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0,
                              reason="root writes anywhere")

# ------------------------------------------------------------------------------- writing


def test_tensors_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "state.safetensors"
    save_tensors(file, {"x": torch.arange(6.0).view(2, 3).T}, {"step": "1"})
    before = file.read_bytes()
    assert list(file.parent.iterdir()) == [file]
    assert torch.equal(load_file(file)["x"], torch.arange(6.0).view(2, 3).T)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"step": "1"}

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_tensors(file, {"x": torch.ones(3)})
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == before


def test_others_may_read_what_is_saved(tmp_path):
    save_tensors(tmp_path / "x", {"x": torch.ones(1, requires_grad=True)})
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    file = tmp_path / "a" / "b" / "file"
    with atomic_write(file) as temporary:
        temporary.write_text("old")
        assert not file.exists() and temporary.parent == file.parent
    with atomic_write(file) as temporary:
        temporary.write_text("half")
        assert file.read_text() == "old"
        temporary.write_text("new")
    assert file.read_text() == "new" and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_write_that_was_stopped(tmp_path, error):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(error), atomic_write(file) as temporary:
        temporary.write_text("half")
        raise error
    assert file.read_text() == "old" and [*tmp_path.iterdir()] == [file]


def test_a_write_that_makes_no_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "file"):
        pass
    assert not [*tmp_path.iterdir()]


def test_a_temporary_name_is_hidden_and_the_process_s_own(tmp_path):
    with atomic_write(tmp_path / "grid.png") as temporary:
        assert temporary.name == f".grid.png.{os.getpid()}.tmp"     # `.*.tmp` may be cleared away
        temporary.touch()


def test_text_is_utf_8_and_names_that_are_none_are_escaped(tmp_path):
    write_text(tmp_path / "x", "é\n" + os.fsdecode(b"\xff"))
    assert (tmp_path / "x").read_bytes() == "é\n\\udcff".encode()


def test_json_is_readable_and_strict(tmp_path):
    file = tmp_path / "results" / "x.json"
    write_json(file, {"fid": 1.5, "name": "é"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"fid": 1.5, "name": "é"}
    assert "é" in file.read_text(encoding="utf-8") and file.read_text().endswith("}\n")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            write_json(file, {"fid": bad})
    assert json.loads(file.read_text(encoding="utf-8"))["fid"] == 1.5


def test_a_file_and_its_name_are_synced(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: synced.append(os.fstat(f).st_ino) or fsync(f))
    (tmp_path / "file").touch()
    sync(tmp_path / "file")
    assert synced == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nowhere")


# ------------------------------------------------------------------------------- folders


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/mine")
    assert expand("~/x") == Path("/home/of/mine/x") == expand(Path("~") / "x")
    assert expand("a/~/x") == Path("a/~/x") and expand("~no-one/x") == Path("~no-one/x")


def test_a_folder_is_made_and_left_empty(tmp_path):
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir() and not [*folder.iterdir()]
    assert writable_folder(str(folder)) == folder
    (tmp_path / "file").touch()
    for name in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            writable_folder(name)


@not_root
def test_a_folder_that_nothing_can_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError):
        writable_folder(tmp_path)
    with pytest.raises(BadInput, match="can't be written to"):
        check_writable(tmp_path / "new")


def test_whether_a_folder_could_be_made_is_seen_without_making_it(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"b can't be written to: .*file is read-only or no folder"):
        check_writable(tmp_path / "file" / "b")
    monkeypatch.chdir(tmp_path)
    check_writable(Path("a/b"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="is read-only"):
        check_writable(tmp_path / "a")


# ------------------------------------------------------------------------------- hashes


def test_the_hash_is_of_all_bytes_in_order(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"weights" * 1_000_000), two.write_bytes(b"more")       # more than one block
    expected = hashlib.sha256(one.read_bytes()).hexdigest()
    assert sha256(one) == sha256(str(one)) == expected
    assert sha256(one, two) == hashlib.sha256(one.read_bytes() + b"more").hexdigest()
    assert sha256(two, prefix=b"any") == hashlib.sha256(b"anymore").hexdigest()
    assert len({sha256(), sha256(one, two), sha256(two, one)}) == 3


def test_two_threads_may_write_different_files(tmp_path):
    def write(k):
        for _ in range(20):
            write_text(tmp_path / f"{k}", f"{k}" * 1000)

    threads = [threading.Thread(target=write, args=(k,)) for k in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2"]
    assert all(p.read_text() == p.name * 1000 for p in tmp_path.iterdir())


# ------------------------------------------------------------------------------- permission


def test_what_may_not_be_read_is_not_said_to_be_missing(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.touch()
    check_readable(file)
    check_readable(tmp_path)
    assert files_in(tmp_path, "*.txt") == [file]
    assert files_in(tmp_path / "nowhere", "*") == files_in(file / "x", "*") == []
    with pytest.raises(FileNotFoundError):
        check_readable(tmp_path / "nowhere")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.X_OK)     # root may do all
    check_readable(file)
    for read in (check_readable, lambda folder: files_in(folder, "*")):
        with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}'"):
            read(tmp_path)


def test_a_folder_that_takes_no_files_is_named_itself(tmp_path, monkeypatch):
    def fail(dir):
        raise PermissionError(13, "Permission denied", f"{dir}/tmpx")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fail)
    with pytest.raises(PermissionError, match=f"Permission denied: '{tmp_path}/out'"):
        writable_folder(tmp_path / "out")
