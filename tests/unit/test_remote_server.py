"""The client's side of a connection, over a channel that is a function: what it does when the server moves on."""

import inspect
import threading

import numpy as np
import pytest

from hosl.core.targets import ClassTargets
from hosl.errors import SessionError, StepMoved
from hosl.parties.remote.server import RemoteServer
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray

TARGETS = ClassTargets(mask=np.ones((2, 3), np.int64), labels=np.zeros(2, np.int64))


class Plain:
    """The conversion of a runtime whose tensors are arrays."""

    def to_wire(self, tensor):
        return WireArray(tensor, "float32")

    def from_wire(self, array):
        return array.data


H = np.ones((2, 3, 4), np.float32)


class Moved(Channel):
    """A channel to a run that is at step 12; the second question is under way until `answered`."""

    def __init__(self):
        self.hellos, self.questions, self.answered = [], 0, threading.Event()

    def for_ever(self, work, say):
        return work()

    def ask(self, name, request, reply_type):
        self.hellos.append(request.current)
        assert len(self.hellos) < 10, "it says hello for ever"
        return pb.HelloReply(session=f"one.{len(self.hellos)}", start=12)

    def upload(self, name, frames, reply_type):
        self.questions += 1
        if self.questions == 2:
            assert self.answered.wait(20)
        raise SessionError("round 3 is closed; say hello again")

    def leave(self, session): ...
    def close(self): ...


def test_a_request_of_a_round_that_was_broken_off_ends():
    """The second pair of probes is under way when the first is told that the run is ten rounds ahead."""
    channel = Moved()
    training = pb.Training(max_steps=20, clients=3)
    server = RemoteServer(channel, lambda at: pb.HelloRequest(current=at, training=training), Plain())
    server.at(2)
    losses = inspect.unwrap(RemoteServer.losses)  # the check of its type would read a loss, and wait for it
    first, second = losses(server, [H, H], TARGETS), losses(server, [H, H], TARGETS)
    with pytest.raises(StepMoved, match="step 12"):
        list(first)
    server.at(12)
    channel.answered.set()
    with pytest.raises(StepMoved):
        list(second)
    server.close()
    assert len(channel.hellos) == 2
