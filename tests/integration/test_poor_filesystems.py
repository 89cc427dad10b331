"""Filesystems without locks, hard links or flushing of folders (exFAT, CIFS, Android): the same run, bit for bit."""

import errno
import fcntl
import os
import stat

import pytest

from hosl.cli import main
from hosl.errors import CheckpointError, FolderError
from hosl.system.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from hosl.system.run_folder import RunLock


def _without(call, number, monkeypatch):
    """Have the system refuse `call` as a filesystem does that has not got it."""

    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    fsync = os.fsync

    def fsync_of_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            refuse()
        fsync(descriptor)

    place, name, replacement = {
        "locks": (fcntl, "flock", refuse), "links": (os, "link", refuse), "flushes": (os, "fsync", fsync_of_files),
    }[call]  # fmt: skip
    monkeypatch.setattr(place, name, replacement)


MISSING = {
    "locks": errno.ENOTSUP, "links": errno.EPERM, "flushes": errno.EINVAL,
}  # fmt: skip


def _checkpoints(run):
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted((run / "checkpoints").rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("missing", [["locks"], ["links"], ["flushes"], list(MISSING)])
def test_a_run_on_a_poor_filesystem_is_the_same_run(tiny_run, tmp_path, monkeypatch, capsys, missing):
    config = tiny_run(max_steps=8, save_steps=2, snapshot_steps=4)
    assert main(["train", str(config), "--output-dir", str(tmp_path / "plain"), "--json"]) == 0
    for call in missing:
        _without(call, MISSING[call], monkeypatch)
    capsys.readouterr()
    assert main(["train", str(config), "--output-dir", str(tmp_path / "poor"), "--json"]) == 0
    assert ("without locks" in capsys.readouterr().err) == ("locks" in missing)
    assert _checkpoints(tmp_path / "poor") == _checkpoints(tmp_path / "plain")
    assert (tmp_path / "poor" / "metrics.jsonl").read_bytes() == (
        tmp_path / "plain" / "metrics.jsonl"
    ).read_bytes()


def test_a_snapshot_is_copied_where_it_cannot_be_linked(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, Checkpoint(step=1, journal=b"x" * 16))
    _without("links", errno.EPERM, monkeypatch)
    second = write_checkpoint(tmp_path, Checkpoint(step=2, linked=("client/journal.bin",)))
    assert read_checkpoint(second).journal == b"x" * 16


def test_a_disk_that_fails_is_still_an_error_with_its_cause(tmp_path, monkeypatch):
    _without("flushes", errno.EIO, monkeypatch)
    with pytest.raises(CheckpointError, match=os.strerror(errno.EIO)):
        write_checkpoint(tmp_path, Checkpoint(step=1))
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_process_holds_is_told_from_a_folder_that_cannot_be_written(
    tmp_path, monkeypatch
):
    with RunLock(tmp_path), pytest.raises(FolderError, match="in use by another process"):
        RunLock(tmp_path)
    with pytest.raises(FolderError, match=f"cannot be written: {os.strerror(errno.ENOENT)}"):
        RunLock(tmp_path / "nowhere")
