"""The service in this process, over a half of two numbers: what a client's calls do, without sockets and torch."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import numpy as np

from hosl.core.journal import Journal
from hosl.service.access import Access
from hosl.service.calls import Calls
from hosl.service.hosted_half import HostedHalf, Stepped
from hosl.service.incoming import Incoming
from hosl.service.limits import Limits
from hosl.service.scheduler import Scheduler
from hosl.service.sessions import Sessions
from hosl.service.status import Status
from hosl.system.checkpoint import Checkpoint, drop_checkpoints_after, read_checkpoint, write_checkpoint
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack

MODEL = pb.Model(family="bert", cut=2, labels=pb.LABELS_AT_SERVER)
ACTIVATIONS = np.ones((2, 3, 4), np.float32)


class CountingHalf(HostedHalf):
    """A `HostedHalf` that counts: `updates` of its weights, and the examples that each came from."""

    def __init__(self):
        self.updates, self.examples, self.pending = 0, [], 0

    def check(self, shape, targets):
        return 4 * shape[0]

    def losses(self, activations, targets):
        return [float(self.updates)] * len(activations)

    def losses_together(self, questions):
        return [self.losses(question.activations, question.targets) for question in questions]

    def contribute_together(self, parts):
        return [self.contribute(p.activations[0], p.targets, p.weight, p.want_gradient) for p in parts]

    def step(self, activations, targets, step, want_gradient):
        self.updates += 1
        return Stepped(float(self.updates), activations if want_gradient else None)

    def contribute(self, activations, targets, examples, want_gradient):
        self.pending += examples
        return Stepped(float(self.updates), activations if want_gradient else None)

    def apply(self, step):
        self.updates, self.pending = self.updates + 1, 0
        self.examples.append(self.pending)

    def save(self, folder, step, facts, journal, beside):
        state = {**facts, "half": self.updates}
        checkpoint = Checkpoint(step, state, journal=journal and journal.to_bytes())
        write_checkpoint(folder, checkpoint, beside=beside)

    def restore(self, folder, step):
        drop_checkpoints_after(folder, step)
        if step == 0:
            self.updates = 0
            return {}, Journal()
        read = read_checkpoint(folder / f"step-{step:08d}")
        self.updates = read.state["half"]
        return read.state, Journal.from_bytes(read.journal or b"")


def step_messages(session, step):
    """The messages of a training step: the question, and the chunk of its activations."""
    packed = pack(WireArray(ACTIVATIONS, "float32"), "none")
    rows, seq, _ = ACTIVATIONS.shape
    targets = pb.Targets(
        mask=pb.Mask(rows=rows, seq=seq, bits=b"\xff"), classes=pb.Classes(labels=[0] * rows)
    )
    where = pb.Where(session=session, step=step)
    ask = pb.Upload(step=pb.AskStep(where=where, activations=packed.header, targets=targets))
    return [ask, *(pb.Upload(chunk=chunk) for chunk in packed.chunks())]


class Service:
    """Calls, sessions and compute thread over one folder; `call` makes one call and returns its replies."""

    def __init__(self, folder, *, limits=None, half=None, merge_tokens=0, status=Status, **how):
        self.told, self.log = [], []
        self.half = half or CountingHalf()
        self.sessions = Sessions(folder, lambda model, training: self.half, **how)
        status = status(lambda line: self.log.append(msgspec.json.decode(line)))
        self.scheduler = Scheduler(merge_tokens, tell=self.told.append, worked=status.worked)
        self.calls = Calls(
            Access(folder), self.sessions, self.scheduler, status, limits or Limits(), idle_s=5.0
        )
        status.watch_tensors(lambda: self.calls.room.taken_bytes)
        self.status = status

    async def call(self, name, client, *messages):
        """All the replies to a call."""
        with self.status.call(client, name):
            incoming = Incoming(_frames(messages), idle_s=5.0, check_access=lambda: None)
            return [reply async for reply in getattr(self.calls, name)(client, incoming)]

    async def hello(self, client, training, run="run", restorable=(0,), current=0, **more):
        """Say hello; returns the reply."""
        request = pb.HelloRequest(
            protocol=1,
            run=run,
            model=MODEL,
            training=training,
            restorable=restorable,
            current=current,
            **more,
        )
        (reply,) = await self.call("_hello", client, request)
        return reply

    async def step(self, client, session, step):
        """One training step; returns its loss."""
        reply, *_ = await self.call("_step", client, *step_messages(session, step))
        return reply.done.loss

    async def save(self, client, session, step):
        """Let the server write a checkpoint; returns its step."""
        (reply,) = await self.call(
            "_save", client, pb.SaveRequest(where=pb.Where(session=session, step=step))
        )
        return reply.step

    async def leave(self, client, session):
        """End a session."""
        await self.call("_leave", client, pb.LeaveRequest(where=pb.Where(session=session)))

    async def journal(self, client, session, step, *update, **more):
        """Hand in an update, in rounds after the step of which it is the update; returns the last reply."""
        run = self.sessions.runs["run"]
        open_ = run.round and run.steps.get(client, 0) < step <= run.round.number <= run.training.max_steps
        if open_ and run._weights.get(client, (0, 0))[0] != step:
            await self.step(client, session, step)
        return await self.hand_in(client, session, step, *update, **more)

    async def hand_in(self, client, session, step, scales=(0.5,), seeds=None, examples=2, have=0):
        """Hand in an update, and nothing else; returns the last reply."""
        seeds = range(1, len(scales) + 1) if seeds is None else seeds
        request = pb.JournalRequest(
            where=pb.Where(session=session, step=step),
            have=have,
            seeds=seeds,
            scales=scales,
            examples=examples,
        )
        return (await self.call("_journal", client, request))[-1]


def training(**changed):
    """The settings of a run of hosl with shared halves in rounds, unless `changed`."""
    facts = {
        "method": pb.HOSL, "distribution": pb.GAUSSIAN, "trainable": pb.ALL, "learning_rate": 1e-3, "max_steps": 12,
        "clients": 3, "halves": pb.SHARED, "order": pb.SYNCHRONOUS, "grace_s": 0.2,
    }  # fmt: skip
    return pb.Training(**facts | changed)


def in_loop(work):
    """Run an async test to its end; a call that hangs fails it."""
    return asyncio.run(asyncio.wait_for(work, 20))


async def _frames(messages) -> AsyncIterator[bytes]:
    for message in messages:
        yield message.SerializeToString()
