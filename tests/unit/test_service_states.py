"""Steps in two parts on the service: one client's at a time, nobody waits for ever, and every part counts once."""

import asyncio

import numpy as np
import pytest

from hosl.core.targets import RowPositionTargets
from hosl.errors import LinkError, WireError
from hosl.service.hosted_half import Stepped
from hosl.service.incoming import Incoming
from hosl.wire import hosl_pb2 as pb
from hosl.wire.targets import positions_to_message
from hosl.wire.tensors import WireArray, pack
from tests.unit.hosted import ACTIVATIONS, CountingHalf, Service, in_loop, training

SCORED = np.array([[0, 1, 1], [0, 0, 1]], np.int8)
ASKED = positions_to_message(RowPositionTargets(np.ones((2, 3), np.int8), SCORED))


class StatesHalf(CountingHalf):
    """Counts the parts of steps: what it was asked for, in order, and the weights of a round."""

    def __init__(self):
        super().__init__()
        self.order, self.weights = [], []

    def states_for_step(self, activations, positions):
        states = self._states("states", activations, positions)

        def update(gradient, step, want_gradient):
            self.order.append("update")
            self.updates += 1
            return Stepped(0.0)

        return states, update

    def states_for_part(self, activations, positions):
        states = self._states("states", activations, positions)

        def contribute(gradient, weight, want_gradient):
            self.weights.append(weight)
            return Stepped(0.0)

        return states, contribute

    def _states(self, name, activations, positions):
        self.order.append(name)
        rows = activations.data[positions.scored.astype(bool)][None]
        return WireArray(rows, "float32")


@pytest.fixture
def service(tmp_path):
    made = Service(tmp_path)
    made.half = StatesHalf()
    return made


async def step_states(service, client, session, step, gate=None, *, idle_s=5.0):
    """One step; its gradient is sent once `gate` is set. Returns the replies."""

    async def frames():
        packed = pack(WireArray(ACTIVATIONS, "float32"), "none")
        where = pb.Where(session=session, step=step)
        ask = pb.AskStepStates(where=where, activations=packed.header, positions=ASKED)
        yield pb.Upload(step_states=ask).SerializeToString()
        for chunk in packed.chunks():
            yield pb.Upload(chunk=chunk).SerializeToString()
        if gate is not None:
            await gate.wait()
        gradient = pack(WireArray(np.ones((1, int(SCORED.sum()), 4), np.float32), "float32"), "none")
        for chunk in gradient.chunks():
            yield pb.Upload(chunk=chunk).SerializeToString()

    with service.status.call(client, "StepStates"):
        incoming = Incoming(
            frames(), idle_s=idle_s, check_access=lambda: None, room=service.calls.room, client=client
        )
        return [reply async for reply in service.calls._step_states(client, incoming)]


async def _greeted(service, **settings):
    settings = {"clients": 2, "halves": pb.PERSONAL, "order": pb.SEQUENTIAL} | settings
    return {name: (await service.hello(name, training(**settings))).session for name in "ab"}


def test_no_update_falls_between_the_two_parts_of_a_step(service):
    async def run():
        sessions, gate = await _greeted(service, grace_s=100.0), asyncio.Event()
        first = asyncio.create_task(step_states(service, "a", sessions["a"], 1, gate))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(step_states(service, "b", sessions["b"], 1))
        await asyncio.sleep(0.1)
        waiting = list(service.half.order)
        gate.set()
        await asyncio.gather(first, second)
        return waiting

    assert in_loop(run()) == ["states"]  # of a alone: b waits for its turn
    assert service.half.order == ["states", "update"] * 2


def test_a_device_that_sends_no_gradient_stops_the_others_for_the_grace_only(service):
    async def run():
        sessions, gate = await _greeted(service, grace_s=0.2), asyncio.Event()
        stuck = asyncio.create_task(step_states(service, "a", sessions["a"], 1, gate))
        await asyncio.sleep(0.1)
        await step_states(service, "b", sessions["b"], 1)
        before = service.half.updates
        gate.set()
        await stuck  # late, and counts at the half as it is now
        return before

    assert in_loop(run()) == 1
    assert service.half.updates == 2


def test_a_step_takes_room_for_its_states_and_their_gradient_at_once(service):
    """The gradient comes while the call holds room: waiting for more then could be for ever."""

    async def run():
        sessions, gate = await _greeted(service, grace_s=100.0), asyncio.Event()
        first = asyncio.create_task(step_states(service, "a", sessions["a"], 1, gate))
        await asyncio.sleep(0.1)
        taken = service.calls.room.taken_bytes
        gate.set()
        await first
        return taken, service.calls.room.taken_bytes

    states_bytes = int(SCORED.sum()) * ACTIVATIONS.shape[2] * 4
    assert in_loop(run()) == (ACTIVATIONS.nbytes + 2 * states_bytes, 0)


@pytest.mark.parametrize("how", ["cancelled", "idle"])
def test_a_device_that_goes_away_gives_its_turn_back(service, how):
    async def run():
        sessions, gate = await _greeted(service, grace_s=100.0), asyncio.Event()
        idle_s = 5.0 if how == "cancelled" else 0.2
        gone = asyncio.create_task(step_states(service, "a", sessions["a"], 1, gate, idle_s=idle_s))
        await asyncio.sleep(0.1)
        if how == "cancelled":
            gone.cancel()
        await step_states(service, "b", sessions["b"], 1)
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else LinkError):
            await gone
        await step_states(service, "a", sessions["a"], 1)

    in_loop(run())
    assert service.half.updates == 2


def test_a_part_of_a_round_weighs_its_scored_positions_and_counts_once(service):
    async def run():
        sessions = await _greeted(service, order=pb.SYNCHRONOUS, grace_s=100.0)
        for name in "ab":
            await step_states(service, name, sessions[name], 1)
        again = await step_states(
            service, "a", sessions["a"], 1
        )  # a lost reply: sent again, nothing is added
        weight = int(SCORED.sum())
        with pytest.raises(WireError, match="the two must be equal"):
            await service.journal("a", sessions["a"], 1, scales=(), examples=weight + 1)
        parts = (service.journal(n, sessions[n], 1, scales=(), examples=weight) for n in "ab")
        await asyncio.gather(*parts)
        return again

    again = in_loop(run())
    assert again[0].states.shape == [1, 3, 4]
    assert service.half.weights == [3, 3]
    assert service.half.updates == 1
