"""The service's own rules, without a network: whose turn it is, how much is allowed, who may speak."""

import asyncio
import subprocess
import sys
import threading

import pytest

from hosl.errors import AccessError, ConfigError, LimitError
from hosl.service.access import Access, bearer
from hosl.service.limits import Limits, Meterage
from hosl.service.rounds import Contribution, Round
from hosl.service.scheduler import Scheduler


def _order(asked):
    """Have the compute thread held while `asked` (client, tokens) queue up; the order in which they are served."""
    served, gate = [], threading.Event()

    async def run():
        scheduler = Scheduler()
        holding = asyncio.create_task(scheduler.run("first", 0, gate.wait))
        await asyncio.sleep(0.05)
        waiting = [
            asyncio.create_task(scheduler.run(client, tokens, lambda client=client: served.append(client)))
            for client, tokens in asked
        ]
        await asyncio.sleep(0.05)
        assert scheduler.queue == len(asked)
        gate.set()
        await asyncio.gather(holding, *waiting)
        scheduler.close()

    asyncio.run(run())
    return served


def test_clients_take_turns_however_many_questions_one_asks():
    assert _order([("a", 10), ("a", 10), ("a", 10), ("b", 10), ("b", 10)]) == ["a", "b", "a", "b", "a"]


def test_turns_are_weighed_by_tokens():
    """b's questions are three times as long: a is served three times for each of them."""
    asked = [("b", 30), ("b", 30), *[("a", 10)] * 6]
    assert _order(asked) == ["b", "a", "a", "a", "b", "a", "a", "a"]


def test_clients_that_came_briefly_are_not_kept_for_ever_and_their_turns_stay_fair():
    """Whoever is ahead of the level is remembered: forgetting it would let a client that asks much go first."""

    async def run():
        scheduler = Scheduler()
        await scheduler.run("greedy", 10**6, lambda: None)
        for number in range(6000):
            await scheduler.run(f"brief-{number // 2}", 10, lambda: None)
        kept = dict(scheduler._served)
        gate, served = threading.Event(), []
        holding = asyncio.create_task(scheduler.run("first", 0, gate.wait))
        await asyncio.sleep(0.05)
        waiting = [
            asyncio.create_task(scheduler.run(client, 10, lambda client=client: served.append(client)))
            for client in ("greedy", "modest")
        ]
        await asyncio.sleep(0.05)
        gate.set()
        await asyncio.gather(holding, *waiting)
        scheduler.close()
        return kept, served

    kept, served = asyncio.run(run())
    assert kept["greedy"] == 10**6
    assert len(kept) <= 1026
    assert served == ["modest", "greedy"]


def test_work_that_fails_lets_the_next_begin():
    async def run():
        scheduler = Scheduler()
        with pytest.raises(ZeroDivisionError):
            await scheduler.run("a", 1, lambda: 1 // 0)
        answer, _ = await scheduler.run("b", 1, lambda: 7)
        scheduler.close()
        return answer

    assert asyncio.run(run()) == 7


def test_a_rate_is_allowed_a_burst_and_then_its_mean():
    now = [0.0]
    meterage = Meterage(Limits(calls_per_s=10), clock=lambda: now[0])

    def call(client="a"):
        with meterage.call(client):
            pass

    for _ in range(20):  # twice the rate at once
        call()
    with pytest.raises(LimitError, match="more than 10 calls per second"):
        call()
    call("b")  # another client's are counted apart
    now[0] += 0.1
    call()
    with pytest.raises(LimitError):
        call()


def test_a_token_is_shown_once_and_kept_as_a_hash(tmp_path):
    access = Access(tmp_path)
    token = access.enrol("phone")
    assert access.client_of(token) == "phone"
    assert token not in (tmp_path / "clients.json").read_text()
    assert (tmp_path / "clients.json").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="enrolled already"):
        access.enrol("phone")
    with pytest.raises(ConfigError, match="client name"):
        access.enrol("../phone")
    others = {name: access.enrol(name) for name in ("tablet", "watch")}
    assert [access.client_of(other) for other in others.values()] == list(others)
    Access(tmp_path).revoke("phone")  # by another process
    with pytest.raises(AccessError, match="has been revoked"):
        access.client_of(token)


CHANGES = """
import sys
from pathlib import Path
from hosl.service.access import Access
access = Access(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(12):
    access.revoke(f"old-{sys.argv[2]}-{number}")
    access.enrol(f"new-{sys.argv[2]}-{number}")
"""


def test_processes_that_change_the_clients_at_once_lose_no_revocation_and_no_client(tmp_path):
    owner = Access(tmp_path)
    tokens = [owner.enrol(f"old-{process}-{number}") for process in range(3) for number in range(12)]
    command = [sys.executable, "-c", CHANGES, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    changing = [subprocess.Popen([*command, str(process)], **pipes) for process in range(3)]
    for process in changing:
        assert process.stdout.readline() == "ready\n"
    for process in changing:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in changing:
        process.communicate()
        assert process.returncode == 0
    names = {client["name"]: client["revoked"] for client in owner.names()}
    assert names == {
        f"{age}-{process}-{number}": age == "old"
        for age in ("old", "new") for process in range(3) for number in range(12)
    }  # fmt: skip
    for token in tokens:
        with pytest.raises(AccessError, match="has been revoked"):
            owner.client_of(token)


@pytest.mark.parametrize(
    ("value", "token"), [("Bearer abc", "abc"), ("bearer abc", "abc"), ("Basic abc", ""), ("", "")]
)
def test_a_bearer_token_is_read(value, token):
    assert bearer(value) == token


def test_a_rounds_update_is_weighed_by_examples_and_adds_equal_seeds():
    gathered = Round(number=3, expected=2, members={"a", "b"})
    gathered.contributions["b"] = Contribution((1, 2), (0.5, 1.0), 30)
    assert not gathered.complete
    gathered.contributions["a"] = Contribution((1,), (1.5,), 10)
    assert gathered.complete
    seeds, scales = gathered.mean_update()
    assert seeds == (1, 2)
    assert scales == pytest.approx((1.5 / 4 + 0.5 * 3 / 4, 1.0 * 3 / 4))
