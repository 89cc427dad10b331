"""Whose runs a service holds: nobody else's work is taken over, undone or deleted unasked, and slots become free."""

import asyncio
import json
import shutil

import pytest

from hosl.cli import main
from hosl.errors import HandshakeError, LimitError, SessionError
from hosl.service.operation.quota import Quota
from hosl.service.sessions import save_all
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import Service, in_loop, training

ALONE = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL)


LOST = {
    "the folder of runs": "runs",
    "the run's folder": "runs/run",
    "its checkpoints": "runs/run/checkpoints",
}


async def _trained(service, steps, *, save_steps=3, client="a", run="run"):
    """A client's `steps` in a run, with a checkpoint every `save_steps`; returns the session."""
    session = (await service.hello(client, ALONE, run=run)).session
    for step in range(1, steps + 1):
        await service.step(client, session, step)
        if step % save_steps == 0:
            await service.save(client, session, step)
    return session


@pytest.mark.parametrize("how", ["restarted", "back at its base weights", "left", "saved"])
def test_a_run_cannot_be_taken_over_by_another_client(tmp_path, how):
    async def run():
        service = Service(tmp_path)
        session = await _trained(service, 4 if how == "saved" else 2)
        if how == "back at its base weights":
            await service.hello("a", ALONE)
        if how == "left":
            await service.leave("a", session)
        if how in ("restarted", "saved"):
            service = Service(tmp_path)
        with pytest.raises(HandshakeError, match="is for 1 clients and has a"):
            await service.hello("b", ALONE)
        return (await service.hello("a", ALONE, restorable=[0, 3] if how == "saved" else [0])).start

    assert in_loop(run()) == (3 if how == "saved" else 0)


@pytest.mark.parametrize(
    "what", ["the folder of runs", "the run's folder", "its checkpoints", "dropped by the owner"]
)
@pytest.mark.parametrize("clients", [1, 3])
def test_a_server_that_lost_a_run_asks_before_the_device_starts_from_nothing(tmp_path, what, clients, capsys):
    settings = training(clients=clients, halves=pb.PERSONAL, order=pb.SEQUENTIAL)

    async def run():
        service = Service(tmp_path)
        session = (await service.hello("a", settings)).session
        for step in range(1, 7):
            await service.step("a", session, step)
            if step % 3 == 0:
                await service.save("a", session, step)
        if what == "dropped by the owner":
            assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 0
            with pytest.raises(SessionError):
                await service.step("a", session, 7)
        else:
            lost = {
                "the folder of runs": "runs",
                "the run's folder": "runs/run",
                "its checkpoints": "runs/run/checkpoints",
            }
            shutil.rmtree(tmp_path / lost[what])
            service = Service(tmp_path)
        with pytest.raises(HandshakeError, match=r"steps \[3, 6\], the server of \[\].*--go-back"):
            await service.hello("a", settings, restorable=[0, 3, 6], current=6)
        return (await service.hello("a", settings, restorable=[0, 3, 6], current=6, may_go_back=True)).start

    assert in_loop(run()) == 0


@pytest.mark.parametrize("has", [[0], [0, 3]])
def test_an_old_copy_of_a_clients_folder_does_not_delete_the_servers_work(tmp_path, has):
    async def run():
        service = Service(tmp_path)
        await _trained(service, 9)  # checkpoints of 6 and 9
        with pytest.raises(HandshakeError, match=r"the server of \[6, 9\].*copy.*--go-back"):
            await service.hello("a", ALONE, restorable=has)
        kept = sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir())
        asked = (await service.hello("a", ALONE, restorable=has, may_go_back=True)).start
        return kept, asked

    assert in_loop(run()) == (["step-00000006", "step-00000009"], 0)


def test_a_client_killed_before_it_wrote_its_first_checkpoint_is_not_asked(tmp_path):
    async def run():
        service = Service(tmp_path)
        await _trained(service, 4)
        return (await service.hello("a", ALONE)).start

    assert in_loop(run()) == 0


def test_a_save_between_a_step_and_its_update_in_the_journal_loses_neither(tmp_path):
    settings = training(clients=2, order=pb.SEQUENTIAL)

    async def run():
        service = Service(tmp_path)
        a, b = [(await service.hello(name, settings)).session for name in "ab"]
        for step in (1, 2):
            await service.step("a", a, step)
            await service.journal("a", a, step)
        await service.step("a", a, 3)
        await service.save("b", b, 0)
        await service.journal("a", a, 3)
        await service.save("a", a, 3)
        return (await Service(tmp_path).hello("a", settings, restorable=[0, 3], current=3)).start

    assert in_loop(run()) == 3


def test_a_server_stopped_again_and_again_keeps_the_checkpoints_that_its_client_has(tmp_path):
    """Each orderly stop saves; the client is then killed and has those of 3 and 6 only."""

    async def run():
        service = Service(tmp_path)
        await _trained(service, 7)
        for stop in (7, 8, 9):
            save_all(service.sessions)
            service = Service(tmp_path)
            greeted = await service.hello("a", ALONE, restorable=[0, 3, 6], current=stop)
            assert greeted.start == stop
            await service.step("a", greeted.session, stop + 1)
        killed = await service.hello("a", ALONE, restorable=[0, 3, 6])
        return killed.start, service.half.updates

    assert in_loop(run()) == (6, 6)


@pytest.mark.parametrize("how", ["left", "silent", "refused"])
def test_an_abandoned_run_makes_room_and_can_be_resumed(tmp_path, how):
    async def run():
        service = Service(tmp_path, away_s=0.3 if how == "silent" else 1000.0)
        if how == "refused":
            with pytest.raises(HandshakeError):
                await service.hello("a", ALONE, restorable=[0, 3])
        else:
            session = await _trained(service, 4)
            with pytest.raises(LimitError, match=r"busy with run \(a\)"):
                await service.hello("b", ALONE, run="other")
        if how == "left":
            await service.leave("b", session)  # not its own
            with pytest.raises(LimitError):
                await service.hello("b", ALONE, run="other")
            await service.leave("a", session)
        await asyncio.sleep(0.4)
        other = (await service.hello("b", ALONE, run="other")).session
        await service.leave("b", other)
        return (
            await service.hello("a", ALONE, restorable=[0, 3] if how != "refused" else [0], current=4)
        ).start

    assert in_loop(run()) == (0 if how == "refused" else 4)


def test_one_client_cannot_fill_the_disk_with_runs(tmp_path):
    async def run():
        service = Service(tmp_path, quota=Quota(runs=3))
        for number in range(40):  # nothing is trained in these
            session = (await service.hello("a", ALONE, run=f"empty-{number}")).session
            await service.leave("a", session)
        folders = len(list((tmp_path / "runs").iterdir()))
        for number in range(3):
            session = await _trained(service, 3, run=f"trained-{number}")
            await service.leave("a", session)
        with pytest.raises(LimitError, match="client a has begun 3 runs here, 3 are allowed"):
            await service.hello("a", ALONE, run="one-more")
        await service.hello("b", ALONE, run="of-another")
        return folders

    assert in_loop(run()) <= 2


def test_the_owner_lists_and_drops_runs(tmp_path, capsys):
    in_loop(_trained(Service(tmp_path), 7))
    assert main(["runs", "ls", "--service", str(tmp_path), "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["runs"]
    assert (told["name"], told["clients"], told["saved_steps"]) == ("run", ["a"], [3, 6])
    assert (told["step"], told["max_steps"]) == (6, 12)
    assert main(["runs", "drop", "other", "--yes", "--service", str(tmp_path)]) == 2
    assert "no run is called other; there are run" in capsys.readouterr().err
    assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 0
    assert list((tmp_path / "runs").iterdir()) == []
    assert main(["runs", "ls", "--service", str(tmp_path / "nowhere")]) == 2
    assert "is no service folder" in capsys.readouterr().err


def test_a_run_whose_handshake_is_damaged_is_listed_and_dropped_and_stops_no_other(tmp_path, capsys):
    in_loop(_trained(Service(tmp_path), 7))
    (tmp_path / "runs" / "run" / "handshake.json").write_text("{")
    assert main(["runs", "ls", "--service", str(tmp_path)]) == 0
    assert "handshake.json is damaged" in capsys.readouterr().out
    in_loop(_trained(Service(tmp_path), 2, run="another"))
    assert main(["runs", "drop", "run", "--yes", "--service", str(tmp_path)]) == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another"]
