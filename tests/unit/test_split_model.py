"""A device that generates with a server: what the server says is checked before a token is chosen."""

import numpy as np
import pytest

from hosl.errors import WireError
from hosl.inference.decoding import Candidates
from hosl.inference.remote import SplitModel
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack

READY = pb.GenerateReply(ready=pb.GenerateReady(run="run", step=3))
ASK = pb.AskGenerate(protocol=1, model=pb.Model(family="llama", cut=1))
WIDTH, VOCABULARY = 4, 9


class Half:
    """A device half whose hidden states are zeros."""

    def new_text(self):
        return lambda ids: WireArray(np.zeros((1, len(ids), WIDTH), np.float32), "float32")

    def candidates(self, state, count):
        return Candidates(np.array([int(state.data[0, 0, 0])]), np.zeros(1, np.float32))


class Server(Channel):
    """A channel to a server that says what it was told to say; it keeps what it hears."""

    def __init__(self, *replies):
        self.replies, self.heard, self.ended = replies, [], False

    def converse(self, name, frames, reply_type):
        assert (name, reply_type) == ("Generate", pb.GenerateReply)
        self.heard = frames
        yield from self.replies


def next_of(*replies, count=1, ask=ASK):
    """The candidates after two tokens, by a server that replies so."""
    server = Server(READY, *replies)
    model = SplitModel(server, Half(), ask, vocabulary=VOCABULARY)
    with model.text(20, count) as next_token:
        told = next_token([1, 2])
    return told, list(server.heard), model.step


def said(**fields):
    return pb.GenerateReply(next=pb.Next(**fields))


def tensor(data, *, cut=0):
    packed = pack(WireArray(np.asarray(data, np.float32), "float32"), "none")
    chunks = [pb.GenerateReply(chunk=bytes(chunk)[: len(chunk) - cut]) for chunk in packed.chunks()]
    return [said(tensor=packed.header), *chunks]


def test_what_is_sent_are_the_question_and_hidden_states_and_nothing_else():
    told, heard, step = next_of(said(tokens=[7], logits=[0.5], step=4))
    assert (told.tokens.tolist(), told.logits.tolist(), step) == ([7], [0.5], 4)
    ask, hidden, chunk = heard
    assert (ask.ask.most_tokens, ask.ask.candidates, ask.ask.model.family) == (20, 1, "llama")
    assert (list(hidden.hidden.shape), len(chunk.chunk)) == ([1, 2, WIDTH], 2 * WIDTH * 4)


def test_all_logits_are_ordered_here_and_a_state_goes_through_the_devices_own_head():
    told, _, _ = next_of(*tensor(np.arange(VOCABULARY, dtype=np.float32).reshape(1, 1, -1)), count=0)
    assert told.tokens.tolist() == list(range(VOCABULARY))[::-1]
    stays = pb.AskGenerate(protocol=1, model=pb.Model(labels=pb.LABELS_AT_CLIENT))
    told, _, _ = next_of(*tensor(np.full((1, 1, WIDTH), 5.0)), ask=stays)
    assert told.tokens.tolist() == [5]


AT_CLIENT = pb.AskGenerate(protocol=1, model=pb.Model(labels=pb.LABELS_AT_CLIENT))
NAN = np.full((1, 1, VOCABULARY), np.nan)


@pytest.mark.parametrize(
    ("replies", "how", "message"),
    [
        ([], {}, "should go on with `next`, got `None`"),
        ([READY], {}, "should go on with `next`, got `ready`"),
        ([said(tokens=[1, 2], logits=[2, 1])], {}, "asked for 1 candidates, the server sent 2"),
        ([said()], {}, "sent 0"),
        ([said(tokens=[1], logits=[1])], {"count": 0}, "asked for 0"),
        ([said(tokens=[1, 2], logits=[1])], {"count": 2}, "sent 2 with 1 logits"),
        ([said(tokens=[1], logits=[float("nan")])], {}, "not ordered by finite logits"),
        ([said(tokens=[1, 2], logits=[1, 2])], {"count": 2}, "not ordered"),
        ([said(tokens=[VOCABULARY], logits=[1])], {}, "token 9 is outside the vocabulary of 9"),
        ([said(tokens=[1], logits=[1])], {"ask": AT_CLIENT}, "sent 1"),
        (tensor(np.zeros((1, 1, VOCABULARY - 1))), {"count": 0}, r"float32 \[1, 1, 9\]"),
        (tensor(np.zeros((1, 2, VOCABULARY))), {"count": 0}, r"float32 \[1, 1, 9\]"),
        (tensor(NAN), {"count": 0}, "NaN or Inf"),
        (tensor(np.zeros((1, 1, VOCABULARY)), cut=1), {"count": 0}, "should go on with `chunk`"),
        (tensor(np.zeros((1, 1, WIDTH + 1))), {"ask": AT_CLIENT}, r"a state is \[1, 1, 4\]"),
    ],
    ids=[
        "nothing", "ready-twice", "too-many", "none", "not-all", "fewer-logits", "nan", "order", "vocabulary",
        "candidates-for-a-state", "narrow", "long", "nan-logits", "cut-short", "wide-state",
    ],
)  # fmt: skip
def test_an_answer_that_cannot_be_meant_is_refused(replies, how, message):
    with pytest.raises(WireError, match=message):
        next_of(*replies, **how)
