"""`hosl runs ls | show | drop` beside a server, without one, and after one that was killed."""

import asyncio
import io
import json
import os
import time
from pathlib import Path

import pytest

from hosl.cli import main
from hosl.errors import CheckpointError, SessionError
from hosl.network.serve import _tended
from hosl.service.operation import live_files
from hosl.service.operation.live_files import LiveFiles, read_progress, read_running
from hosl.service.operation.overview import stored_run
from hosl.service.sessions import save_all
from hosl.system.readable import readable_span
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import CountingHalf, Service, in_loop, training

SETTINGS = {
    "alone": training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL),
    "sequential": training(clients=2, halves=pb.PERSONAL, order=pb.SEQUENTIAL),
    "in rounds": training(clients=2, halves=pb.PERSONAL, grace_s=1000.0),
}


async def _worked(service, kind, steps=4):
    """Clients a (and b) in `run`: as many steps each, b one fewer where each goes its own pace; saved after step 2."""
    settings, names = SETTINGS[kind], "a" if kind == "alone" else "ab"
    sessions = {name: (await service.hello(name, settings)).session for name in names}
    for step in range(1, steps + 1):
        for name in names:
            if kind != "sequential" or name == "a" or step < steps:
                await service.step(name, sessions[name], step)
        if kind == "in rounds":
            await asyncio.gather(*(service.hand_in(name, sessions[name], step) for name in names))
        if step == 2:
            await service.save("a", sessions["a"], step)
    return sessions


def _told(folder, capsys, *words):
    capsys.readouterr()
    assert main(["runs", *words, "--service", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("kind", "live", "saved", "steps"),
    [
        ("alone", 4, 2, {"a": 4}),
        ("sequential", 3, 2, {"a": 4, "b": 3}),
        ("in rounds", 4, 2, {"a": 4, "b": 4}),
    ],
)
def test_a_run_is_told_as_the_server_has_it_and_without_one_as_its_checkpoint_has_it(
    tmp_path, capsys, kind, live, saved, steps
):
    async def run():
        service = Service(tmp_path)
        await _worked(service, kind)
        files = LiveFiles(tmp_path, service.sessions.now)
        await files.write()
        (beside,) = _told(tmp_path, capsys, "ls")["runs"]
        loss = service.sessions.runs["run"].last_loss
        return beside, loss, _told(tmp_path, capsys, "show", "run")

    beside, loss, shown = in_loop(run())
    assert (beside["step"], beside["max_steps"], beside["present"]) == (live, 12, len(steps))
    assert {seat["name"]: seat["step"] for seat in beside["seats"]} == steps
    assert (beside["loss_nats"], beside["in_memory"], beside["method"]) == (loss, True, "hosl")
    assert abs(beside["heard"] - time.time()) < 20
    assert [c["damage"] for c in shown["checkpoints"]] == [None]
    assert shown["server"]["alive"]
    (tmp_path / "running.json").unlink()  # as after an orderly end
    (after,) = _told(tmp_path, capsys, "ls")["runs"]
    assert (after["step"], after["present"], after["in_memory"]) == (saved, 0, False)
    assert all(seat["step"] == 2 for seat in after["seats"] if seat["name"] == "a")


def test_a_run_that_comes_back_into_memory_keeps_its_loss_and_when_its_clients_were_heard(tmp_path):
    async def run():
        service = Service(tmp_path)
        await _worked(service, "sequential")
        save_all(service.sessions)
        LiveFiles(tmp_path, service.sessions.now).close()
        heard = read_progress(tmp_path / "runs" / "run").clients["b"].heard
        again = Service(tmp_path)
        await again.hello("a", SETTINGS["sequential"])
        return heard, again.sessions.now()[0], service.sessions.runs["run"].last_loss

    heard, now, loss = in_loop(run())
    assert now.clients["b"].heard == heard
    assert not now.clients["b"].present
    assert now.clients["a"].present
    assert now.loss == loss


def test_a_server_that_was_killed_is_not_taken_for_one_that_runs(tmp_path, capsys, monkeypatch):
    (tmp_path / "runs").mkdir()
    LiveFiles(tmp_path, list)._write(())
    assert read_running(tmp_path).alive
    assert main(["runs", "ls", "--service", str(tmp_path)]) == 0
    assert f"process {os.getpid()}; in memory: no run" in capsys.readouterr().out
    monkeypatch.setattr(live_files, "_SILENT_S", 0.0)
    assert main(["runs", "ls", "--service", str(tmp_path)]) == 0
    assert "it was killed, or cannot write here" in capsys.readouterr().out
    (tmp_path / "running.json").write_text("{")
    assert main(["runs", "ls", "--service", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "server: none runs in this folder\nno runs\n"


def test_nothing_is_written_or_locked_by_looking(tmp_path, capsys):
    in_loop(_worked(Service(tmp_path), "alone"))

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    before = files()
    for words in (["ls"], ["show", "run"]):
        assert main(["runs", *words, "--service", str(tmp_path)]) == 0
    assert files() == before


def test_show_names_a_damaged_checkpoint_and_an_intact_one(tmp_path, capsys):
    async def run():
        service = Service(tmp_path)
        session = (await service.hello("a", SETTINGS["alone"])).session
        for step in (1, 2):
            await service.step("a", session, step)
            await service.save("a", session, step)

    in_loop(run())
    state = tmp_path / "runs" / "run" / "checkpoints" / "step-00000002" / "state.json"
    state.write_text(state.read_text().replace('"half": 2', '"half": 3'))
    capsys.readouterr()
    assert main(["runs", "show", "run", "--service", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "checkpoint of step 1: " in out
    assert "intact" in out
    assert "DAMAGED: checkpoint" in out
    assert "state.json has another digest" in out
    assert "client a: step 1, away" in out  # of the newest that can be read


def _refuse_below(folder, monkeypatch):
    """What lies in a folder belongs to somebody else, as files that root made."""

    def refusing(of, refused):
        def call(path, *args, **options):
            if refused(path):
                raise PermissionError(13, "Permission denied", str(path))
            return of(path, *args, **options)

        return call

    def below(path):
        return folder in path.parents

    for name in ("stat", "is_file", "read_bytes"):
        monkeypatch.setattr(Path, name, refusing(getattr(Path, name), below))
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, lambda path: str(path) == str(folder)))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder)


def test_a_run_s_folder_that_cannot_be_read_is_named_and_no_other_run_is_hurt(tmp_path, capsys, monkeypatch):
    async def run():
        service = Service(tmp_path, runs_at_once=2)
        for name in ("foreign", "own"):
            session = (await service.hello("a", SETTINGS["alone"], run=name)).session
            await service.step("a", session, 1)
            await service.save("a", session, 1)
        again = Service(tmp_path, runs_at_once=2)
        _refuse_below(tmp_path / "runs" / "foreign", monkeypatch)
        session = (await again.hello("a", SETTINGS["alone"], run="own", restorable=(0, 1), current=1)).session
        await again.step("a", session, 2)
        await again.save("a", session, 2)
        await again.hello("a", SETTINGS["alone"], run="another")
        with pytest.raises(CheckpointError, match=r"is damaged: .*Permission denied"):
            await again.hello("a", SETTINGS["alone"], run="foreign", restorable=(0, 1), current=1)

    in_loop(run())
    told = {told["name"]: told["damage"] for told in _told(tmp_path, capsys, "ls")["runs"]}
    assert "Permission denied" in told.pop("foreign")
    assert told == {"own": None, "another": None}


def test_a_dropped_run_of_which_a_file_cannot_be_deleted_is_said_to_be_gone_and_where_it_is(
    tmp_path, capsys, monkeypatch
):
    in_loop(_worked(Service(tmp_path), "alone"))

    def rmtree(path, **options):
        raise PermissionError(13, "Permission denied", str(path / "checkpoints"))

    monkeypatch.setattr("hosl.service.operation.stored.shutil.rmtree", rmtree)
    assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "run run is dropped, but not all of it could be deleted: " in said
    assert str(tmp_path / "runs" / ".run.dropped") in said
    assert (tmp_path / "runs" / ".run.dropped" / "checkpoints").is_dir()


def test_a_run_that_is_deleted_while_it_is_looked_at_is_left_out(tmp_path, monkeypatch):
    in_loop(_worked(Service(tmp_path), "alone"))
    monkeypatch.setattr("hosl.service.operation.overview.handshake_in", lambda folder: None)
    assert stored_run(tmp_path, "run") is None


@pytest.mark.parametrize("answer", ["y\n", "YES\n", "n\n", "\n", ""])
def test_drop_asks_and_only_yes_deletes(tmp_path, capsys, monkeypatch, answer):
    in_loop(_worked(Service(tmp_path), "alone"))

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    dropped = answer.strip().lower() in ("y", "yes")
    assert main(["runs", "drop", "run", "--service", str(tmp_path)]) == (0 if dropped else 2)
    said = capsys.readouterr().err
    assert "run run: 2 of 12 steps, " in said
    assert "Delete it for good? [y/N]" in said
    assert (tmp_path / "runs" / "run").exists() is not dropped


def test_drop_without_a_terminal_wants_yes_said(tmp_path, capsys, monkeypatch):
    in_loop(_worked(Service(tmp_path), "alone"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["runs", "drop", "run", "--service", str(tmp_path)]) == 2
    assert "nobody is here to be asked; say --yes" in capsys.readouterr().err
    told = _told(tmp_path, capsys, "drop", "run", "--yes")
    assert told["dropped"] == "run"
    assert told["freed_bytes"] > 100
    assert main(["runs", "ls", "--yes", "--service", str(tmp_path)]) == 2
    assert "--yes is for drop" in capsys.readouterr().err


def test_a_server_lets_go_of_a_dropped_run_and_writes_nothing_of_it_again(tmp_path, capsys):
    async def run():
        service = Service(tmp_path)
        sessions = await _worked(service, "sequential")
        files = LiveFiles(tmp_path, service.sessions.now)
        await files.write()
        assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 0
        dropped = [run.name for run in service.sessions.dropped()]
        save_all(service.sessions)  # as at the end of the server, before anybody called
        await files.write()
        left = [str(path) for path in (tmp_path / "runs").rglob("*")]
        with pytest.raises(SessionError):
            await service.save("a", sessions["a"], 4)
        service.sessions.forget_dropped()
        return dropped, left, service.sessions.now()

    assert in_loop(run()) == (["run"], [], [])


def test_a_run_that_is_dropped_while_it_is_saved_leaves_nothing(tmp_path):
    class Slow(CountingHalf):
        def save(self, folder, step, facts, journal, beside):
            assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 0
            super().save(folder, step, facts, journal, beside)

    async def run():
        service = Service(tmp_path, half=Slow())
        session = (await service.hello("a", SETTINGS["alone"])).session
        await service.step("a", session, 1)
        await service.save("a", session, 1)

    in_loop(run())
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("error", [CheckpointError("no space"), OSError(30, "no space")])
def test_one_run_that_cannot_be_saved_keeps_no_other_from_it(tmp_path, error):
    class Full(CountingHalf):
        def save(self, folder, step, facts, journal, beside):
            if folder.parent.name == "first":
                raise error
            super().save(folder, step, facts, journal, beside)

    async def run():
        service = Service(tmp_path, half=Full(), runs_at_once=2)
        for name in ("first", "second"):
            session = (await service.hello("a", SETTINGS["alone"], run=name)).session
            await service.step("a", session, 1)
        with pytest.raises(type(error), match="no space"):
            save_all(service.sessions)

    in_loop(run())
    assert (tmp_path / "runs" / "second" / "checkpoints" / "step-00000001").is_dir()


def test_a_write_that_comes_late_does_not_bring_an_ended_server_back(tmp_path):
    files = LiveFiles(tmp_path, list)
    files._write(())
    assert read_running(tmp_path).alive
    files.close()
    files._write(())  # of a thread that outlived its task
    assert read_running(tmp_path) is None


def test_a_failure_while_the_files_are_written_is_logged_and_they_are_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(live_files, "PERIOD_S", 0.01)

    class Failing:
        failures = 2

        def now(self):
            self.failures -= 1
            if self.failures >= 0:
                raise RuntimeError("a bug")
            return []

        def dropped(self):
            return []

    async def run():
        service = Service(tmp_path)
        async with _tended(tmp_path, Failing(), service.scheduler, service.status):
            while not (tmp_path / "running.json").exists():
                await asyncio.sleep(0.01)
        return [line["trace"].splitlines()[-1] for line in service.log if line["event"] == "failed"]

    assert in_loop(run()) == ["RuntimeError: a bug"]  # one line, not one for each


def test_a_disk_that_takes_no_files_is_said_once_and_stops_nobody(tmp_path):
    said = []
    files = LiveFiles(tmp_path / "nowhere", list, said.append)
    files._write(())
    files._write(())
    assert len(said) == 1
    assert "running.json and progress.json cannot be written: No such file" in said[0]


def test_spans_of_time_are_said_in_their_largest_unit():
    said = [
        readable_span(seconds)
        for seconds in (-3.0, 0.4, 59.0, 60.0, 3599.0, 3600.0, 86399.0, 86400.0, 864000.0)
    ]
    assert said == ["0 s", "0 s", "59 s", "1 min", "59 min", "1 h", "23 h", "1 day", "10 days"]
