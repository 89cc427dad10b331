"""Filesystems without locks, hard links or flushing of folders (exFAT, CIFS, Android): the same run, bit for bit."""

import errno
import fcntl
import json
import os
import stat
import threading

import pytest

from hosl.cli import main
from hosl.errors import CheckpointError, FolderError
from hosl.service.access import Access
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


@pytest.mark.parametrize(
    "missing",
    [
        *(pytest.param([call], marks=pytest.mark.slow) for call in ("locks", "links", "flushes")),
        list(MISSING),
    ],
)
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


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_clients_are_added_and_revoked_where_there_are_no_locks(tmp_path, monkeypatch, capsys, number):
    _without("locks", number, monkeypatch)
    address = {"address": "server.example:7070", "fingerprint": "F" * 43}
    (tmp_path / "address.json").write_text(json.dumps(address))
    for words in (["add", "phone"], ["add", "tablet"], ["revoke", "phone"]):
        assert main(["clients", *words, "--service", str(tmp_path)]) == 0
        assert f"on a filesystem without locks ({os.strerror(number)})" in capsys.readouterr().err
    assert {client["name"]: client["revoked"] for client in Access(tmp_path).names()} == {
        "phone": True, "tablet": False
    }  # fmt: skip


def test_a_lock_of_the_clients_waits_for_another_process_and_that_of_a_run_does_not(tmp_path):
    access, order = Access(tmp_path), []

    def enrol():
        access.enrol("phone")
        order.append("enrolled")

    with RunLock(tmp_path), RunLock(tmp_path, file=".clients.lock"):
        thread = threading.Thread(target=enrol)
        thread.start()
        thread.join(0.3)
        order.append("released")
    thread.join(10)
    assert order == ["released", "enrolled"]


def test_a_service_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / ".clients.lock").mkdir()  # root may write anywhere, but not to a folder
    assert main(["clients", "revoke", "phone", "--service", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written: {os.strerror(errno.EISDIR)}" in capsys.readouterr().err


def test_a_lock_that_another_process_holds_is_told_from_a_folder_that_cannot_be_written(
    tmp_path, monkeypatch
):
    with RunLock(tmp_path), pytest.raises(FolderError, match="in use by another process"):
        RunLock(tmp_path)
    with pytest.raises(FolderError, match=f"cannot be written: {os.strerror(errno.ENOENT)}"):
        RunLock(tmp_path / "nowhere")
