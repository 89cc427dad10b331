"""Calls of several clients that the service answers together: what counts, what is refused, what is never merged."""

import asyncio
import threading

import pytest

from hosl.errors import HoslError
from hosl.wire import hosl_pb2 as pb
from tests.unit.hosted import CountingHalf, Service, in_loop, step_messages, training

NAMES = ("first", "second", "third")


class WatchedHalf(CountingHalf):
    """Counts the examples of a round that are not applied yet; losses say what they were asked at."""

    def apply(self, step):
        self.examples.append(self.pending)
        self.updates, self.pending = self.updates + 1, 0


def _losses_messages(session, step):
    ask, *chunks = step_messages(session, step)
    question = pb.AskLosses(
        where=ask.step.where, activations=[ask.step.activations], targets=ask.step.targets
    )
    return [pb.Upload(losses=question), *chunks]


async def _held(service, queue_up):
    """The answers to calls that queue up while the compute thread is held."""
    gate = threading.Event()
    holding = asyncio.create_task(service.scheduler.run("holder", 0, gate.wait))
    await asyncio.sleep(0.02)
    tasks = [asyncio.create_task(call) for call in queue_up]
    await asyncio.sleep(0.1)
    gate.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    await holding
    return answers


def _service(folder, **how):
    return Service(folder, half=WatchedHalf(), merge_tokens=512, **how)


def test_parts_of_a_round_are_added_together_once_each_and_a_repeated_call_gets_its_reply(tmp_path):
    """The third client's call is repeated while it waits, as after a lost connection: both are in one pass."""

    async def run():
        service = _service(tmp_path)
        sessions = [(await service.hello(name, training())).session for name in NAMES]
        calls = [*zip(NAMES, sessions, strict=True), (NAMES[2], sessions[2])]
        losses = await _held(service, [service.step(name, session, 1) for name, session in calls])
        for name, session in zip(NAMES, sessions, strict=True):
            await service.step(name, session, 1)  # once more, alone: from the cache
        parts = [
            asyncio.create_task(service.hand_in(name, session, 1))
            for name, session in zip(NAMES, sessions, strict=True)
        ]
        await asyncio.gather(*parts)
        return service, losses

    service, losses = in_loop(run())
    assert losses == [0.0] * 4
    assert service.told[0] == 4
    assert service.half.examples == [6]  # three batches of two rows
    assert service.half.updates == 1


def test_a_client_with_another_step_is_refused_alone(tmp_path):
    async def run():
        service = _service(tmp_path)
        order = {"order": pb.SEQUENTIAL}
        sessions = [(await service.hello(name, training(**order))).session for name in NAMES]
        steps = (1, 2, 1)
        calls = [
            service.call("_losses", name, *_losses_messages(session, step))
            for name, session, step in zip(NAMES, sessions, steps, strict=True)
        ]
        return service, await _held(service, calls)

    service, (first, second, third) = in_loop(run())
    assert list(first[0].losses) == list(third[0].losses) == [0.0]
    assert isinstance(second, HoslError)
    assert "from the future" in str(second)
    assert service.told == [3]


def test_losses_are_answered_before_or_after_a_step_as_they_came_and_steps_alone(tmp_path):
    async def run():
        service = _service(tmp_path)
        order = {"order": pb.SEQUENTIAL}
        first, second, third = [(await service.hello(name, training(**order))).session for name in NAMES]
        calls = [
            service.call("_losses", "first", *_losses_messages(first, 1)),
            service.step("second", second, 1),
            service.call("_losses", "third", *_losses_messages(third, 1)),
        ]
        return service, await _held(service, calls)

    service, (before, _, after) = in_loop(run())
    assert list(before[0].losses) == [0.0]
    assert list(after[0].losses) == [1.0]
    assert service.told == [1, 1]


@pytest.mark.parametrize("merge_tokens", [0, 512])
def test_a_run_of_one_client_is_never_merged(tmp_path, merge_tokens):
    async def run():
        service = Service(tmp_path, half=WatchedHalf(), merge_tokens=merge_tokens)
        settings = training(clients=1, order=pb.SEQUENTIAL, halves=pb.PERSONAL)
        session = (await service.hello("first", settings)).session
        calls = [service.call("_losses", "first", *_losses_messages(session, 1)) for _ in range(2)]
        await _held(service, calls)
        return service

    assert in_loop(run()).told == []
