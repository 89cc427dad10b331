"""Seats of a run whose clients are revoked, and messages whose counts disagree: by name, before anything is changed."""

import asyncio

import pytest

from hosl.cli import main
from hosl.errors import AccessError, HandshakeError, SessionError, WireError
from hosl.service.access import Access
from hosl.service.limits import HELLO_CALLS, Limits, Meterage
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import Service, in_loop, training


def _enrolled(folder, names):
    access = Access(folder)
    for name in names:
        access.enrol(name)
    return access


def _revoke(folder, name):
    assert main(["clients", "revoke", name, "--service", str(folder)]) == 0


SETTINGS = {
    "sequential, shared": training(clients=2, order=pb.SEQUENTIAL),
    "sequential, personal": training(clients=2, order=pb.SEQUENTIAL, halves=pb.PERSONAL),
    "in rounds, shared": training(clients=2, grace_s=1000.0),
    "in rounds, personal": training(clients=2, halves=pb.PERSONAL, grace_s=1000.0),
    "alone": training(clients=1, order=pb.SEQUENTIAL, halves=pb.PERSONAL),
}


@pytest.mark.parametrize("restarted", [False, True])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_seat_of_a_revoked_client_is_free_for_another_and_for_one_only(tmp_path, kind, restarted):
    settings = SETTINGS[kind]
    access = _enrolled(tmp_path, "abcd")

    async def run():
        service = Service(tmp_path, revoked=access.revoked)
        for name in "ab"[: settings.clients]:
            await service.hello(name, settings)
        with pytest.raises(HandshakeError, match="clients and has a"):
            await service.hello("c", settings)
        _revoke(tmp_path, "a")
        if restarted:
            service = Service(tmp_path, revoked=access.revoked)
        greeted = await service.hello("c", settings)
        await service.step("c", greeted.session, greeted.start + 1)
        with pytest.raises(HandshakeError, match=r"clients and has (b, )?c;"):
            await service.hello("d", settings)
        return service.sessions.clients_of(service.sessions.runs["run"])

    assert "c" in in_loop(run())


@pytest.mark.parametrize("restarted", [False, True])
def test_who_takes_a_seat_over_goes_on_with_its_count_so_that_the_journal_stays_a_runs(tmp_path, restarted):
    settings = training(clients=2, order=pb.SEQUENTIAL, max_steps=3)
    access = _enrolled(tmp_path, "abcd")

    async def run():
        service = Service(tmp_path, revoked=access.revoked)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        for name, steps in (("a", 2), ("b", 3)):
            for step in range(1, steps + 1):
                await service.step(name, sessions[name], step)
                await service.journal(name, sessions[name], step)
        await service.save("b", sessions["b"], 3)
        _revoke(tmp_path, "a")
        with pytest.raises(HandshakeError, match="--go-back"):  # who is refused leaves the seat as it was
            await service.hello("d", settings, restorable=[0, 9], current=9)
        with pytest.raises(HandshakeError, match="learning_rate"):
            await service.hello("d", training(clients=2, order=pb.SEQUENTIAL, max_steps=3, learning_rate=0.5))
        greeted = await service.hello("c", settings)
        if restarted:  # before another checkpoint
            service = Service(tmp_path, revoked=access.revoked)
            greeted = await service.hello("c", settings)
        for step in range(greeted.start + 1, settings.max_steps + 1):
            await service.step("c", greeted.session, step)
            await service.journal("c", greeted.session, step)
        return greeted.start, service.sessions.runs["run"]

    start, served = in_loop(run())
    assert start == 2
    assert served.updates == 2 * 3  # a client refuses a journal that is longer
    assert served.finished


def test_a_round_does_not_wait_for_a_client_that_was_revoked_once_its_seat_is_taken(tmp_path):
    access = _enrolled(tmp_path, "abc")
    settings = training(clients=2, grace_s=1000.0)

    async def run():
        service = Service(tmp_path, revoked=access.revoked)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        waiting = asyncio.create_task(service.journal("b", sessions["b"], 1))
        await asyncio.sleep(0.1)
        _revoke(tmp_path, "a")
        greeted = await service.hello("c", settings)
        await service.journal("c", greeted.session, greeted.start + 1)
        return (await waiting).late, service.sessions.runs["run"]

    late, served = in_loop(run())  # the grace is longer than the test may take
    assert not late
    assert served.server_step == 1
    assert served.round.members == {"b", "c"}


def test_an_answer_to_a_revoked_client_is_no_answer_to_who_takes_its_seat(tmp_path):
    access = _enrolled(tmp_path, "ac")
    settings = SETTINGS["alone"]

    async def run():
        service = Service(tmp_path, revoked=access.revoked)
        session = (await service.hello("a", settings)).session
        await service.step("a", session, 1)
        _revoke(tmp_path, "a")
        greeted = await service.hello("c", settings)
        await service.step("c", greeted.session, 1)
        return greeted.start, service.half.updates

    assert in_loop(run()) == (
        0,
        1,
    )  # the half went back to its base weights, and was then updated by c's step


def test_a_run_of_revoked_clients_makes_room_for_another(tmp_path):
    access = _enrolled(tmp_path, "ab")

    async def run():
        service = Service(tmp_path, revoked=access.revoked, away_s=1e9)
        await service.hello("a", SETTINGS["alone"])
        _revoke(tmp_path, "a")
        await service.hello("b", SETTINGS["alone"], run="another")
        return list(service.sessions.runs)

    assert in_loop(run()) == ["another"]


@pytest.mark.parametrize("examples", [1, 3, 2**32 - 1])
@pytest.mark.parametrize("halves", [pb.SHARED, pb.PERSONAL])
def test_an_update_of_more_or_fewer_examples_than_its_step_had_rows_is_refused(tmp_path, examples, halves):
    """Of 2**32 - 1 examples, one device's update would have been the whole mean of the round."""

    async def run():
        service = Service(tmp_path)
        settings = training(clients=2, halves=halves)
        sessions = {name: (await service.hello(name, settings)).session for name in "ab"}
        for name in "ab":
            await service.step(name, sessions[name], 1)  # two rows
        with pytest.raises(WireError, match=rf"{examples} examples for step 1, whose Step had 2 rows"):
            await service.journal("a", sessions["a"], 1, (100.0,), (7,), examples=examples)
        parts = (("a", 1.0), ("b", 3.0))
        await asyncio.gather(
            *(service.journal(name, sessions[name], 1, (scale,), (7,)) for name, scale in parts)
        )
        return service.sessions.runs["run"].updates_after(0)

    (update,) = in_loop(run())
    assert list(update.scales) == [2.0]  # the mean of 1 and 3: equally many examples


def test_an_update_before_its_step_is_refused(tmp_path):
    async def run():
        service = Service(tmp_path)
        session = (await service.hello("a", training(clients=1))).session
        with pytest.raises(WireError, match="2 examples for step 1, whose Step had not come yet"):
            await service.hand_in("a", session, 1)
        await service.step("a", session, 1)
        await service.hand_in("a", session, 1)
        with pytest.raises(WireError, match="for step 2, whose Step had not come yet"):
            await service.hand_in("a", session, 2)  # of the step before, it had come
        return service.sessions.runs["run"].server_step

    assert in_loop(run()) == 1


@pytest.mark.parametrize("order", [pb.SEQUENTIAL, pb.SYNCHRONOUS])
@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"seeds": [1, 2], "scales": [0.5]}, "one number per seed, got 2 seeds and 1 numbers"),
        ({"seeds": [1], "scales": [0.5], "examples": 0}, "1 directions comes from no examples"),
        (
            {"seeds": [], "scales": [], "examples": 0, "have": 2},
            "2 updates of a journal of 1: its half has gone",
        ),
    ],
)
def test_counts_of_a_journal_that_disagree_are_refused_and_change_nothing(tmp_path, order, counts, says):
    async def run():
        service = Service(tmp_path)
        session = (await service.hello("a", training(clients=1, order=order, grace_s=0.1))).session
        await service.step("a", session, 1)
        await service.journal("a", session, 1)
        await service.step("a", session, 2)
        served = service.sessions.runs["run"]
        before = served.updates, dict(served.steps), served.journal.to_bytes()
        with pytest.raises(WireError, match=says):
            await service.hand_in("a", session, 2, **counts)
        return before, (served.updates, dict(served.steps), served.journal.to_bytes())

    before, after = in_loop(run())
    assert before == after


@pytest.mark.parametrize("calls_per_s", [1, 200, 100_000])
def test_hello_again_and_again_is_refused_by_name_and_allowed_a_moment_later(calls_per_s):
    now = [0.0]
    meterage = Meterage(Limits(calls_per_s=calls_per_s), clock=lambda: now[0])

    def hello(client="a"):
        with meterage.call(client, HELLO_CALLS):
            pass

    counts = min(HELLO_CALLS, 2 * calls_per_s)
    for _ in range(2 * calls_per_s // counts):
        hello()
    with pytest.raises(Exception, match=f"of which a hello counts for {counts}; wait a moment") as refused:
        hello()
    assert type(refused.value).__name__ == "BusyError"  # which a client tries again
    hello("b")  # another client's are counted apart
    now[0] += counts / calls_per_s
    hello()


@pytest.mark.parametrize("kind", SETTINGS)
def test_of_two_processes_with_one_join_line_the_older_ends_and_does_not_say_hello_for_ever(tmp_path, kind):
    async def run():
        service = Service(tmp_path)
        older = await service.hello("a", SETTINGS[kind])
        newer = await service.hello("a", SETTINGS[kind])
        with pytest.raises(AccessError, match="another process has said hello as client a since"):
            await service.step("a", older.session, 1)
        with pytest.raises(SessionError, match="say hello again"):  # another client learns nothing by it
            await service.step("b", older.session, 1)
        await service.step("a", newer.session, 1)
        await service.leave("a", newer.session)
        with pytest.raises(SessionError, match="say hello again"):  # it left: nobody goes on in its place
            await service.step("a", newer.session, 2)

    in_loop(run())
