"""Rounds of several clients on the service: they close however the calls fall, and count every part once."""

import asyncio
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from hosl.core.journal import Journal
from hosl.errors import LimitError, WireError
from hosl.service.sessions import save_all
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import CountingHalf, Service, in_loop, training


async def _greeted(service, names, **settings):
    return {name: (await service.hello(name, training(**settings))).session for name in names}


def _busy(service):
    """Occupy the compute thread; returns the task and the event that ends it."""
    gate = threading.Event()
    return asyncio.create_task(service.scheduler.run("another", 0, gate.wait)), gate


def test_a_round_closes_though_a_part_came_between_the_timers_end_and_the_close(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "abc")
        await service.step("b", sessions["b"], 1)
        first = asyncio.create_task(service.journal("a", sessions["a"], 1))
        await asyncio.sleep(0.1)
        busy, gate = _busy(service)
        await asyncio.sleep(0)
        second = asyncio.create_task(service.journal("b", sessions["b"], 1))
        await asyncio.sleep(0.3)  # the grace is over, and the close waits for its turn after b's part
        gate.set()
        await asyncio.gather(busy, first, second)
        reply = await service.journal("a", sessions["a"], 2)  # b and c never come: the grace must run again
        return reply, service.sessions.runs["run"].server_step

    reply, rounds = in_loop(run())
    assert rounds == 2
    assert [update.step for update in reply.updates] == [1, 2]


def test_a_round_closes_though_the_client_that_completed_it_went_away(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2, grace_s=0.5)
        first = asyncio.create_task(service.journal("a", sessions["a"], 1))
        await asyncio.sleep(0.1)
        taken, gate = asyncio.Event(), threading.Event()
        loop, contribute = asyncio.get_running_loop(), service.sessions.runs["run"].contribute

        def held(*part):
            answer = contribute(*part)
            loop.call_soon_threadsafe(taken.set)
            return answer

        service.sessions.runs["run"].contribute = held
        second = asyncio.create_task(service.journal("b", sessions["b"], 1))
        await taken.wait()
        busy, gate = _busy(service)
        await asyncio.sleep(0.05)  # the close of the complete round waits for its turn
        second.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        await busy
        return await first

    assert not in_loop(run()).late


@pytest.mark.parametrize(
    ("scales", "seeds"),
    [
        ((3e38, 3e38), (7, 7)),
        ((float("inf"), 1.0), (7, 8)),
        ((float("nan"),), (7,)),
        ((-3e38,) * 3, (7, 8, 7)),
    ],
)
@pytest.mark.parametrize("order", [pb.SYNCHRONOUS, pb.SEQUENTIAL])
def test_an_update_that_does_not_stay_finite_is_refused_and_the_run_goes_on(tmp_path, scales, seeds, order):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2, order=order, grace_s=1000.0)
        for name in "ab":
            await service.step(name, sessions[name], 1)
        with pytest.raises(WireError, match="NaN, Inf or a number beyond"):
            await service.journal("b", sessions["b"], 1, scales, seeds)
        parts = [service.journal(name, sessions[name], 1, (1e17, 1.0), (7, 8)) for name in "ab"]
        await asyncio.gather(*parts)
        return service.sessions.runs["run"].updates_after(0)

    updates = in_loop(run())
    largest = np.float32(1e17)
    expected = (
        [(largest, 1.0)] if order == pb.SYNCHRONOUS else [(largest, 1.0)] * 2
    )  # the mean of two equal parts
    assert [tuple(update.scales) for update in updates] == expected


def test_a_client_that_only_says_hello_is_waited_for_once(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "abc")
        for number in range(1, 5):
            await service.hello("c", service.sessions.runs["run"].training, current=number - 1)
            await asyncio.gather(*(service.journal(name, sessions[name], number) for name in "ab"))
            service.sessions.runs["run"].training.grace_s = 1000.0  # from here on, waiting would hang
        return [event["clients"] for event in service.log if event["event"] == "dropped"]

    assert in_loop(run()) == [["c"]]


def test_a_client_slower_than_the_grace_makes_steps_that_count_once(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2)
        await service.step("b", sessions["b"], 1)  # b is at its step 1 while three rounds are closed
        for number in (1, 2, 3):
            await service.journal("a", sessions["a"], number, seeds=[100 + number])
        slow = asyncio.create_task(service.journal("b", sessions["b"], 1, seeds=[200]))
        await asyncio.sleep(0.05)
        await service.journal("a", sessions["a"], 4, seeds=[104])
        first, again = await slow, await service.journal("b", sessions["b"], 1, seeds=[200])
        await service.step("b", sessions["b"], 5)
        await asyncio.gather(
            *(service.journal(name, sessions[name], 5, seeds=[n]) for n, name in ((105, "a"), (205, "b")))
        )
        return first, again, service.sessions.runs["run"]

    first, again, served = in_loop(run())
    assert (first.late, first.step) == (again.late, again.step) == (True, 4)  # where b goes on from
    assert [list(update.seeds) for update in served.updates_after(0)] == [
        [101],
        [102],
        [103],
        [104, 200],
        [105, 205],
    ]
    assert served.updates_after(3)[0].scales == [0.25, 0.25]  # the mean of one update of a and one of b


def test_all_clients_of_a_round_are_told_from_one_reading_of_the_journal(tmp_path, monkeypatch):
    read = []
    updates = Journal.updates
    monkeypatch.setattr(Journal, "updates", lambda self, after=0: read.append(after) or updates(self, after))

    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "abc", clients=3)
        for number in (1, 2):
            for name in "abc":
                await service.step(name, sessions[name], number)
            await asyncio.gather(
                *(
                    service.journal(name, sessions[name], number, seeds=[number], have=number - 1)
                    for name in "abc"
                )
            )
        return service.sessions.runs["run"]

    served = in_loop(run())
    assert read == [0, 1]
    assert [list(update.seeds) for update in served.updates_after(0)] == [[1], [2]]
    served.save(asked=True)
    at_two = served.updates_after(0)
    served.journal.append(3, [9], [1.0])
    served.updates = 3
    assert [list(update.seeds) for update in served.updates_after(0)] == [[1], [2], [9]]
    served.go_back(2)  # another journal with as many updates as one that was told before
    assert served.updates_after(0) == at_two
    served.journal.append(3, [7], [1.0])
    served.updates = 3
    assert [list(update.seeds) for update in served.updates_after(0)] == [[1], [2], [7]]


def test_a_client_that_missed_the_last_round_is_told_that_the_run_is_over(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2, max_steps=3)
        for number in (1, 2, 3):
            await service.journal("a", sessions["a"], number)
        reply = await service.journal("b", sessions["b"], 1)
        return (
            reply,
            (await service.hello("b", training(clients=2, max_steps=3))).start,
            service.sessions.runs["run"],
        )

    reply, start, served = in_loop(run())
    assert (reply.late, reply.step, start) == (True, 3, 3)
    assert served.server_step == 3
    assert served.finished


@pytest.mark.parametrize("halves", [pb.PERSONAL, pb.SHARED])
def test_a_client_killed_after_its_step_does_that_step_again_and_goes_on(tmp_path, halves):
    async def run():
        service = Service(tmp_path)
        settings = training(order=pb.SEQUENTIAL, halves=halves)
        session = (await service.hello("a", settings)).session
        for step in range(1, 8):
            loss = await service.step("a", session, step)
            if halves == pb.SHARED and step < 7:  # killed before it handed in its update of step 7
                await service.journal("a", session, step)
        greeted = await service.hello("a", settings, restorable=[0, 3, 6])
        again = await service.step("a", greeted.session, 7)
        if halves == pb.SHARED:
            await service.journal("a", greeted.session, 7)
        await service.step("a", greeted.session, 8)
        return loss, greeted.start, again, service

    loss, start, again, service = in_loop(run())
    assert start == 6
    assert again == loss  # what the step was answered before
    assert service.half.updates == 8  # each step moved the server's half once
    assert service.sessions.runs["run"].updates == (7 if halves == pb.SHARED else 0)


@pytest.mark.parametrize("scales", [(0.25,), ()], ids=["an update", "none, every probe was rejected"])
@pytest.mark.parametrize("ended", ["killed", "asked to end"])
def test_an_update_that_came_after_another_clients_save_is_kept_by_its_own(tmp_path, ended, scales):
    """Else a client that was told that its last step is saved ends with a half that no other client has."""

    async def run():
        service = Service(tmp_path)
        settings = training(order=pb.SEQUENTIAL, clients=2, max_steps=2)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        for name, session in sessions.items():
            await service.step(name, session, 1)
            await service.journal(name, session, 1)
        await service.step("a", sessions["a"], 2)
        await service.save("b", sessions["b"], 1)  # between the two parts of a's step
        await service.journal("a", sessions["a"], 2, scales=scales)
        if ended == "killed":
            assert await service.save("a", sessions["a"], 2) == 3
        else:
            save_all(service.sessions)
        after = Service(tmp_path)
        start = (await after.hello("b", settings)).start
        return start, after.sessions.runs["run"], service.sessions.runs["run"]

    start, after, before = in_loop(run())
    assert start == 1
    assert after.journal.to_bytes() == before.journal.to_bytes()
    assert list(after.journal.updates(after=2)) == ([(3, (1,), scales)] if scales else [])
    assert (after.steps["a"], after._journaled["a"], after.server_step) == (2, 2, 3)


def test_a_round_waits_for_half_of_a_usual_round_where_that_is_longer_than_the_grace(tmp_path, monkeypatch):
    now, waits = [0.0], []
    monkeypatch.setattr("hosl.service.rounds.time", SimpleNamespace(monotonic=lambda: now[0]))

    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2, grace_s=30.0)
        served, close_after = service.sessions.runs["run"], service.calls._close_after
        monkeypatch.setattr(
            service.calls, "_close_after", lambda s, run, part: waits.append(s) or close_after(s, run, part)
        )
        for number, length_s in ((1, 20.0), (2, 200.0), (3, 220.0), (4, 1.0)):
            for name in "ab":
                await service.step(name, sessions[name], number)
            now[0] += length_s
            parts = [asyncio.create_task(service.journal("a", sessions["a"], number))]
            await asyncio.sleep(0.05)
            now[0] += length_s / 10  # b comes later
            await asyncio.gather(*parts, service.journal("b", sessions["b"], number))
        return list(served._lengths_s), served.grace_s

    lengths_s, grace_s = in_loop(run())
    assert lengths_s == pytest.approx([22.0, 220.0, 242.0, 1.1])
    assert [wait_s for wait_s in waits if wait_s] == pytest.approx([30.0, 30.0, 30.0, 110.0])
    assert grace_s == 30.0  # the lower of the two in the middle, 22 s, is no longer than a minute


def test_a_round_of_more_directions_than_a_device_can_make_is_refused_and_goes_on(tmp_path):
    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "ab", clients=2, grace_s=0.3)
        many = range(1, 3001)
        first = asyncio.create_task(service.journal("a", sessions["a"], 1, (0.5,) * 3000, many))
        await asyncio.sleep(0.05)
        with pytest.raises(LimitError, match=r"would have 6000 directions.*set clients.directions: common"):
            await service.journal("b", sessions["b"], 1, (0.5,) * 3000, range(3001, 6001))
        await service.journal("b", sessions["b"], 1, (0.5,) * 3000, many)  # common ones are counted once
        await first
        return service.sessions.runs["run"]

    run = in_loop(run())
    assert (run.server_step, len(run.updates_after(0)[0].seeds)) == (1, 3000)


def test_clients_that_save_after_a_round_write_one_checkpoint(tmp_path, monkeypatch):
    written = []

    def save(self, folder, step, *others):
        written.append(step)
        return kept(self, folder, step, *others)

    kept = CountingHalf.save
    monkeypatch.setattr(CountingHalf, "save", save)

    async def run():
        service = Service(tmp_path)
        sessions = await _greeted(service, "abc")
        for number in (1, 2):
            await asyncio.gather(*(service.journal(name, sessions[name], number) for name in "abc"))
            await asyncio.gather(*(service.save(name, sessions[name], number) for name in "abc"))

    in_loop(run())
    assert written == [1, 2]
