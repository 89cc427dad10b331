"""Rounds of several clients on the service: they close however the calls fall, and count every part once."""

import asyncio
import threading

from tests.unit.hosted import Service, in_loop, training


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
