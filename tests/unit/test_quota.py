"""What one client may take: runs, bytes on disk, a seat; refused by name. And buckets of calls that are forgotten."""

import os
import time

import pytest

from hosl.errors import HandshakeError, LimitError, SessionError
from hosl.service.limits import Limits, Meterage
from hosl.service.operation.live_files import LiveFiles
from hosl.service.operation.quota import Quota
from hosl.service.operation.stored import size_bytes
from hosl.service.sessions import save_all
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import CountingHalf, Service, in_loop, training

ALONE = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL, max_steps=100)


class Heavy(CountingHalf):
    """A half whose checkpoint takes 100,000 bytes more."""

    def save(self, folder, step, facts, journal, beside):
        super().save(folder, step, facts | {"ballast": "x" * 100_000}, journal, beside)


async def _steps(service, session, first, last, client="a"):
    for step in range(first, last + 1):
        await service.step(client, session, step)
        await service.save(client, session, step)


def test_a_client_with_too_much_on_disk_is_refused_at_save_and_hello_and_nothing_is_deleted(tmp_path):
    async def run():
        service = Service(tmp_path, half=Heavy(), quota=Quota(disk_bytes=250_000), runs_at_once=3)
        session = (await service.hello("a", ALONE)).session
        await _steps(service, session, 1, 1)
        await service.step("a", session, 2)
        with pytest.raises(
            LimitError, match=r"client a has 9\d.* KiB on .* 29\d KiB with run run; 244 KiB are .*run"
        ):
            await service.save("a", session, 2)  # at the second: three of them will lie here
        with pytest.raises(LimitError, match="--disk-per-client"):
            await service.hello("a", ALONE, restorable=[0, 1], current=1)
        session = (await service.hello("b", ALONE, run="of-b")).session  # another client's are counted apart
        await _steps(service, session, 1, 1, client="b")
        assert service.sessions.runs["run"].server_step == 2
        save_all(service.sessions)  # what the server saves on its own is never refused
        return sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir())

    assert in_loop(run()) == ["step-00000001", "step-00000002"]


def test_room_that_the_owner_makes_is_used_at_once(tmp_path):
    async def run():
        service = Service(tmp_path, half=Heavy(), quota=Quota(disk_bytes=450_000), runs_at_once=3)
        old = (await service.hello("a", ALONE, run="old")).session
        await _steps(service, old, 1, 2)
        session = (await service.hello("a", ALONE)).session
        with pytest.raises(LimitError, match=r"the largest are old \(19\d KiB\), run \(9\d\.\d KiB\)"):
            await _steps(service, session, 1, 2)
        from hosl.cli import main

        assert main(["runs", "drop", "old", "--yes", "--service", str(tmp_path)]) == 0
        await service.save("a", session, 2)
        await _steps(service, session, 3, 5)

    in_loop(run())


def test_a_finished_run_and_a_damaged_handshake_are_no_reason_to_refuse(tmp_path):
    short = training(clients=1, halves=pb.PERSONAL, order=pb.SEQUENTIAL, max_steps=2)

    async def run():
        service = Service(tmp_path, half=Heavy(), runs_at_once=2)
        await _steps(service, (await service.hello("a", short, run="finished")).session, 1, 2)
        session = (await service.hello("a", ALONE)).session
        await _steps(service, session, 1, 1)
        save_all(service.sessions)
        tight = Service(tmp_path, half=Heavy(), quota=Quota(disk_bytes=1000), runs_at_once=2)
        greeted = await tight.hello("a", short, run="finished", restorable=[0, 1, 2], current=2)
        assert greeted.start == 2
        with pytest.raises(LimitError, match="--disk-per-client"):  # before it trains
            await tight.hello("a", ALONE, restorable=[0, 1], current=1)
        await service.step("a", session, 2)
        (tmp_path / "runs" / "run" / "handshake.json").write_text("{")
        save_all(service.sessions)
        return sorted(path.name for path in (tmp_path / "runs" / "run" / "checkpoints").iterdir())

    assert in_loop(run()) == ["step-00000001", "step-00000002"]


def test_a_run_of_several_clients_counts_at_the_one_that_began_it(tmp_path):
    settings = training(clients=2, halves=pb.PERSONAL, order=pb.SEQUENTIAL, max_steps=100)

    async def run():
        service = Service(tmp_path, half=Heavy(), quota=Quota(disk_bytes=250_000))
        await service.hello("a", settings)
        session = (await service.hello("b", settings)).session
        with pytest.raises(LimitError, match="client a has"):
            await _steps(service, session, 1, 2, client="b")

    in_loop(run())


def test_a_file_with_two_names_is_counted_once(tmp_path):
    (tmp_path / "one").write_bytes(b"x" * 1000)
    os.link(tmp_path / "one", tmp_path / "two")
    (tmp_path / "three").write_bytes(b"x" * 10)
    assert size_bytes(tmp_path) == 1010


SEATS = {
    "sequential": training(clients=2, order=pb.SEQUENTIAL),
    "in rounds": training(clients=2, grace_s=0.1),
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("kind", SEATS)
def test_the_seat_of_a_client_that_was_silent_for_too_long_is_anothers_once_one_asks(
    tmp_path, kind, restarted
):
    settings = SEATS[kind]

    async def run():
        service = Service(tmp_path, seat_s=1000.0)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        for name in "ab":
            await service.step(name, sessions[name], 1)
        with pytest.raises(HandshakeError, match=r"has a, b; set clients\.count"):  # both were heard just now
            await service.hello("c", settings)
        service.sessions._heard._clients["run"]["a"] -= 1001
        LiveFiles(tmp_path, service.sessions.now).close()
        if restarted:
            service = Service(tmp_path, seat_s=1000.0)
        else:
            assert not service.sessions.now()[0].clients["a"].present
        greeted = await service.hello("c", settings)
        await service.step("c", greeted.session, greeted.start + 1)
        with pytest.raises(SessionError):
            await service.step("a", sessions["a"], 2)
        with pytest.raises(HandshakeError, match="the seat of a, which was not heard for long, went to c"):
            await service.hello("a", settings)
        with pytest.raises(HandshakeError, match="2 clients and has b, c;"):
            await service.hello("d", settings)

    in_loop(run())


def test_who_trains_alone_keeps_its_seat_however_long_it_is_silent(tmp_path):
    async def run():
        service = Service(tmp_path, seat_s=0.0)
        await service.hello("a", ALONE)
        service.sessions._heard._clients["run"]["a"] -= 1e9
        with pytest.raises(HandshakeError, match="is for 1 clients and has a"):
            await service.hello("b", ALONE)

    in_loop(run())


def test_a_client_of_which_no_time_is_known_is_as_silent_as_its_run(tmp_path):
    settings = SEATS["sequential"]

    async def run():
        service = Service(tmp_path)
        for name in "ab":
            await service.hello(name, settings)
        older = Service(tmp_path, seat_s=1000.0)  # begun by a version without progress.json
        with pytest.raises(HandshakeError):
            await older.hello("c", settings)
        long_ago = time.time() - 1001
        os.utime(tmp_path / "runs" / "run" / "handshake.json", (long_ago, long_ago))
        await older.hello("c", settings)

    in_loop(run())


def test_a_meterage_forgets_clients_that_are_gone_and_lets_nobody_call_more_often(tmp_path):
    now = [0.0]
    meterage = Meterage(Limits(calls_per_s=10, concurrent_calls=1), clock=lambda: now[0])

    def call(client):
        with meterage.call(client):
            pass

    for _ in range(20):
        call("greedy")
    running = meterage.call("long")
    running.__enter__()
    for number in range(10_000):
        now[0] += 1e-6
        call(f"device-{number}")
        if number % 2000 == 0:
            now[0] += 1.0  # greedy has half of its burst again
            for _ in range(10):
                call("greedy")
            with pytest.raises(LimitError, match="client greedy makes more than 10 calls"):
                call("greedy")
    assert len(meterage._buckets) < 5000
    with pytest.raises(LimitError, match="client long has 1 calls running"):
        call("long")
    running.__exit__(None, None, None)
    call("long")
