"""A checkpoint that a disk has damaged is told from one that is as it was written."""

import json
import shutil
from unittest.mock import create_autospec

import pytest
import torch

from hosl.core.journal import Journal
from hosl.errors import CheckpointError, HandshakeError
from hosl.service.hosted_half import HostedHalf
from hosl.service.runs import ServedRun
from hosl.service.sessions import Sessions
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import (
    Checkpoint,
    add_to_checkpoint,
    intact_steps,
    journal_bytes,
    keep_newest,
    newest_checkpoint,
    read_checkpoint,
    read_without_tensors,
    write_checkpoint,
)
from hosl.wire import hosl_pb2 as pb
from hosl.wire.half_files import stored_journal

STATE = {"metrics_bytes": 1234, "snapshot_step": 4, "task_digest": "ab12"}


def written(folder, step, *, journaled=True, linked=()):
    journal = Journal()
    for done in range(1, step + 1):
        journal.append(done, [17 * done], [0.5])
    names = {"client/trained", "server/trained", "server/optimiser"}
    names -= {name.removesuffix(".safetensors") for name in linked}
    tensors = {name: {"w": torch.arange(6.0) * step} for name in names}
    kept = journal.to_bytes() if journaled else None
    return write_checkpoint(
        folder, Checkpoint(step, dict(STATE), tensors=tensors, journal=kept, linked=linked)
    )


def flip(file, at=-1, bit=1):
    data = bytearray(file.read_bytes())
    data[at] ^= bit
    file.write_bytes(bytes(data))


WAYS = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: flip(file),
    "emptied": lambda file: file.write_bytes(b""),
    "gone": lambda file: file.unlink(),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("journaled", [True, False])
def test_every_damaged_file_of_the_newest_checkpoint_leads_back_to_the_one_before(tmp_path, way, journaled):
    for step in (4, 8):
        newest = written(tmp_path / "whole", step, journaled=journaled)
    names = {str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file()}
    snapshot = {"client/trained.safetensors"} if journaled else set()
    assert len(names) == 5 if journaled else 4
    for name in names - snapshot:
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(tmp_path / "whole", folder)
        WAYS[way](folder / "step-00000008" / name)
        said = []
        assert list(intact_steps(folder, said.append)) == [4]
        assert len(said) == 1
        assert name in said[0]
        assert said[0].endswith("the newest intact one is of step 4")


def test_when_no_intact_checkpoint_is_left_it_is_an_error_that_says_so(tmp_path):
    for step in (4, 8):
        flip(written(tmp_path, step) / "server" / "trained.safetensors")
    with pytest.raises(CheckpointError, match="no intact checkpoint is left"):
        list(intact_steps(tmp_path, print))
    assert list(intact_steps(tmp_path / "nothing", print)) == []


def test_no_flipped_bit_of_state_json_changes_what_is_read(tmp_path):
    path = written(tmp_path, 8)
    file, whole = path / "state.json", (path / "state.json").read_bytes()
    harmless = 0
    for at in range(len(whole)):
        for bit in (1, 4, 16):
            flip(file, at, bit)
            try:
                found = read_checkpoint(path)
            except CheckpointError:
                pass
            else:  # white space, an escape
                harmless += 1
                assert (found.step, found.state) == (8, STATE)
            file.write_bytes(whole)
    assert harmless < len(whole) / 2
    assert read_checkpoint(path).state == STATE


def test_a_checkpoint_of_version_0_2_without_a_digest_of_its_state_is_read(tmp_path):
    path = written(tmp_path, 8)
    state = json.loads((path / "state.json").read_text())
    del state["digest"]
    (path / "state.json").write_text(json.dumps(state | {"format": 1}))
    assert read_checkpoint(path).state == STATE
    (path / "state.json").write_text(json.dumps(state))  # format 2 has one
    with pytest.raises(CheckpointError, match="another digest"):
        read_checkpoint(path)


def test_a_snapshot_that_is_linked_on_is_held_against_its_first_digest(tmp_path):
    flip(written(tmp_path, 4) / "client" / "trained.safetensors")
    path = written(tmp_path, 8, linked=("client/trained.safetensors",))
    said = []
    assert list(intact_steps(tmp_path, said.append)) == [8, 4]
    assert "its journal rebuilds the same weights" in said[0]
    found = read_checkpoint(path)
    assert "client/trained" not in found.tensors
    assert found.journal is not None


def test_what_is_added_to_a_checkpoint_is_read_with_it_and_a_failed_addition_leaves_it_as_it_was(
    tmp_path, monkeypatch
):
    path = written(tmp_path, 8)
    before = read_checkpoint(path)
    for more in (9, 10):
        longer = Journal.from_bytes(read_checkpoint(path).journal)
        longer.append(more, [more, 2 * more], [0.25, -0.5])
        add_to_checkpoint(path, {"snapshot_step": more}, longer.to_bytes())
        for read in (read_checkpoint(path), read_without_tensors(path)[0]):
            assert (read.step, read.journal) == (8, longer.to_bytes())
            assert read.state == STATE | {"snapshot_step": more}
    assert torch.equal(
        read_checkpoint(path).tensors["client/trained"]["w"], before.tensors["client/trained"]["w"]
    )
    assert list(intact_steps(tmp_path, pytest.fail)) == [8]

    (served,) = stored_journal(path / "client" / "journal.bin", journal_bytes(path))
    assert served.size_bytes == len(longer.to_bytes())

    with pytest.raises(CheckpointError, match="went another way"):
        add_to_checkpoint(path, {}, longer.to_bytes()[16:])
    yet = Journal.from_bytes(longer.to_bytes())
    yet.append(11, [11], [0.125])
    written_whole, written_files = whole_file, []

    def full(file, content):
        written_files.append(file.name)
        if file.name == "state.json":
            raise OSError(28, "No space left")
        written_whole(file, content)

    monkeypatch.setattr("hosl.system.checkpoint.whole_file", full)
    with pytest.raises(CheckpointError, match="No space left; it is as it was"):
        add_to_checkpoint(path, {"snapshot_step": 11}, yet.to_bytes())
    assert written_files == ["journal.bin", "state.json"]  # as after a kill between the two
    read = read_checkpoint(path)
    assert (read.journal, read.state) == (longer.to_bytes(), STATE | {"snapshot_step": 10})
    assert journal_bytes(path) == len(longer.to_bytes())
    monkeypatch.undo()
    add_to_checkpoint(path, {"snapshot_step": 11}, yet.to_bytes())
    assert read_checkpoint(path).journal == yet.to_bytes()
    flip(path / "client" / "journal.bin", at=3)
    with pytest.raises(CheckpointError, match="journal"):
        read_checkpoint(path)


def test_stray_files_among_the_checkpoints_are_ignored_and_stay(tmp_path):
    strays = [".DS_Store", "notes.txt", "step-old", "step-00000099.txt", "step-12"]
    written(tmp_path, 4)
    for name in strays:
        (tmp_path / name).write_text("mine")
    (tmp_path / "step-backup").mkdir()
    (tmp_path / ".step-00000006.partial").mkdir()  # left by a kill
    for step in (8, 12):
        written(tmp_path, step)
    assert list(intact_steps(tmp_path, print)) == [12, 8]
    keep_newest(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000012"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*strays, "step-backup", "step-00000012"}


def test_a_copy_under_another_step_is_no_checkpoint_of_that_step(tmp_path):
    shutil.copytree(written(tmp_path, 4), tmp_path / "step-00000040")
    said = []
    assert list(intact_steps(tmp_path, said.append)) == [4]
    assert "its folder was renamed" in said[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 40,
        b"{}",
        b"[]",
        b'{"model": 1, "training": {}}',
        b'{"model": {"cut": "x"}, "training": {}}',
    ],
)
def test_a_damaged_handshake_of_a_run_on_the_server_is_refused_by_name(tmp_path, content):
    sessions = Sessions(tmp_path, lambda model, training: pytest.fail("opened"))
    (tmp_path / "runs" / "my").mkdir(parents=True)
    (tmp_path / "runs" / "my" / "handshake.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"run my: handshake\.json on the server is damaged"):
        sessions.hello("first", pb.HelloRequest(protocol=1, run="my"))
    assert (tmp_path / "runs" / "my" / "handshake.json").read_bytes() == content


def test_a_server_ended_twice_between_two_saves_still_has_the_states_of_its_client(tmp_path):
    """The client saved at 100; SIGTERM at 150 and at 171, there in mid-step: both sides go on from 100, not from 0."""
    half = create_autospec(HostedHalf, instance=True)

    def save(folder, step, facts, journal, beside):
        write_checkpoint(folder, Checkpoint(step, dict(facts)), beside=beside)

    def restore(folder, step):
        return read_checkpoint(folder / f"step-{step:08d}").state if step else {}, Journal()

    half.save.side_effect, half.restore.side_effect = save, restore

    def started(step):
        run = ServedRun("my", pb.Model(), pb.Training(max_steps=300, clients=1), half, tmp_path)
        if step:
            run.go_back(step)
        return run

    def ends(run, at):
        run.server_step = at
        run.save(asked=False)
        return started(at)

    run = started(0)
    for step in (50, 100):
        run.server_step = step
        run.save(asked=True)
    run = ends(ends(run, 150), 171)
    assert list(intact_steps(tmp_path, print)) == [171, 100, 50]
    assert run.settle("first", [0, 50, 100], 170) == 100
    half.restore.assert_called_with(tmp_path, 100)

    run.server_step = 200
    run.save(asked=True)
    assert list(intact_steps(tmp_path, print))[:2] == [200, 100]


def test_a_state_that_only_the_client_has_is_no_reason_to_go_back_to_the_base_weights(tmp_path):
    half = create_autospec(HostedHalf, instance=True)
    run = ServedRun("my", pb.Model(), pb.Training(max_steps=300, clients=1), half, tmp_path)
    with pytest.raises(HandshakeError, match="both go on from step 0, and what is later is deleted"):
        run.settle("first", [0, 100], 130)
    assert run.settle("first", [0], 30) == 0  # before its first save
    half.restore.assert_not_called()
