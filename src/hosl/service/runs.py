"""One run on the server: its half, each client's step, the last replies, the shared journal, checkpoints.

Every method that reads or changes the half runs in the compute thread (`Scheduler.run`), one after the other: no other
lock is needed. A state-changing request carries (client, step). The step after the recorded one is executed; the
recorded one gets its reply from the cache; any other is refused. `settle` finds the state that both sides go on from.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple, TypeVar, cast

from hosl.core.journal import Journal
from hosl.core.targets import AskedPositions, Targets, weight_of
from hosl.errors import HandshakeError, HoslError, SessionError, StepError, WireError
from hosl.service.hosted_half import Asked, HostedBank, HostedHalf, OwnAsked, Stepped
from hosl.service.replies import IN_MEMORY_BYTES, Replies
from hosl.service.rounds import (
    ROUNDS_NEEDED,
    ROUNDS_REMEMBERED,
    SHARE_OF_A_ROUND,
    Contribution,
    Round,
)
from hosl.service.turn import Turn
from hosl.system.checkpoint import (
    add_to_checkpoint,
    checkpoint_path,
    checkpoint_steps,
    drop_checkpoints_after,
    intact_steps,
)
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray

_Asked = TypeVar("_Asked")
BASE = "(base)"
"""The name of what is no run: a half as it was split, opened for use. No run can have it."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What a client asks of a run at a step, when others may be answered with it."""

    client: str
    step: int
    activations: list[WireArray]
    targets: Targets
    want_gradient: bool = False


@dataclass
class ServedRun:
    """One run. `name` and `training` never change."""

    name: str
    model: pb.Model
    training: pb.Training
    half: HostedHalf
    folder: Path
    """The folder of its checkpoints."""
    say: Callable[[str], None] = lambda text: None
    """Is called with a line about each damaged checkpoint."""
    client: str = ""
    """Personal adapters: the client whose part of a run this is, named NAME/CLIENT; it is alone in it."""
    steps: dict[str, int] = field(default_factory=dict)
    """The last step of each client that changed the half, or that a Hello settled on."""
    journal: Journal = field(default_factory=Journal)
    """Shared client halves: the updates of all clients, in the one order in which every client applies them."""
    updates: int = 0
    """The number of updates in the shared journal; an update's number is its step in the journal."""
    server_step: int = 0
    """The number of updates of the server half."""
    last_loss: float | None = None
    """The loss of the newest step, nats; None where the labels stay with the client."""
    turn: Turn = field(default_factory=Turn)
    """Is held from the states of a step to its update, where each step of several clients is applied as it comes."""
    let_go: bool = False
    """Whether another object has taken its place in memory, or will: what is asked of it is asked again."""
    round: Round | None = None
    """The round that collects contributions; None under the sequential schedule."""
    _replies: Replies = field(init=False)
    """The newest (step, reply) of each client, for a request that is repeated."""
    _weights: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The newest (step, weight) of each client whose gradient was added to a round: its rows or scored tokens."""
    _states: dict[str, WireArray] = field(default_factory=dict)
    """The states that each client was sent last, where the labels stay with the client."""
    _asked: list[int] = field(default_factory=list)
    """The steps of the newest two checkpoints that a client asked for, and has or may have, too."""
    _journaled: dict[str, int] = field(default_factory=dict)
    """The last step of each client whose update is in the shared journal."""
    _missed: set[str] = field(default_factory=set)
    """The clients that a round closed without: none waits for them until they contribute again."""
    _lengths_s: deque[float] = field(default_factory=lambda: deque(maxlen=ROUNDS_REMEMBERED))
    """The lengths of the newest rounds."""
    _saved: dict[str, int] = field(default_factory=dict)
    """The value of `_journaled` in the newest checkpoint."""
    _told: tuple[tuple[Journal, int, int], list[pb.Update]] | None = None
    """The newest answer of `updates_after`, and what it answers: of which journal, since when, until when."""

    def __post_init__(self) -> None:
        share = max(self.training.clients, 1) if self.client else 1
        self._replies = Replies(self.home, IN_MEMORY_BYTES // share)
        if self.training.order == pb.SYNCHRONOUS:
            self.round = Round(number=1, expected=self.training.clients)

    @property
    def shown(self) -> str:
        """The name for people and peers; empty for a half as it was split, which is no run."""
        return "" if self.name == BASE else self.of

    @property
    def of(self) -> str:
        """The name of the whole run, where this is one client's part of it."""
        return self.name.partition("/")[0]

    @property
    def home(self) -> Path:
        """The folder of the whole run."""
        return self.folder.parents[2] if self.client else self.folder.parent

    @property
    def alone(self) -> bool:
        """Whether one client trains this half, so that both sides can go back together."""
        return self.training.clients <= 1 or self.training.personal_server

    @property
    def takes_turns(self) -> bool:
        """Whether no update may fall between the two parts of a client's step."""
        return self.round is None and not self.alone

    @property
    def finished(self) -> bool:
        """Whether every client that came has done its last step, or the last round is closed."""
        steps = self.steps.values() if self.round is None else [self.server_step]
        return bool(steps) and all(step >= self.training.max_steps for step in steps)

    # ---- Hello: the state that both sides go on from ----

    def agree(self, model: pb.Model, training: pb.Training) -> None:
        """Refuse another model, other settings or other classes than the run's.

        Raises:
            HandshakeError: naming the first difference with both values.
        """
        for ours, theirs in ((self.model, model), (self.training, training)):
            for descriptor in ours.DESCRIPTOR.fields:
                our_value, their_value = getattr(ours, descriptor.name), getattr(theirs, descriptor.name)
                if descriptor.name == "labels_digest" and our_value != their_value:
                    if not our_value:  # begun by a version that did not tell it
                        self.training.labels_digest = their_value
                        continue
                    raise HandshakeError(
                        f"run {self.name}: this device has other classes, or the same in another order, than the "
                        "device that began the run; set task.labels to one list on every device"
                    )
                if our_value != their_value:
                    raise HandshakeError(
                        f"run {self.name}: the server has {descriptor.name} = {_shown(our_value)}, this client "
                        f"{_shown(their_value)}; give both the same config, or choose another output_dir for another "
                        "run"
                    )

    def settle(
        self, client: str, restorable: Sequence[int], current: int, *, may_go_back: bool = False
    ) -> int:
        """The step after which server and client go on.

        A client alone in its run: the newest state that both sides have; the server goes back to it. One of several
        clients: the server never goes back. In rounds, the newest one that is closed; else shared halves go on after
        the client's last update in the journal, a personal half from the newest state that the server has seen of it.

        Args:
            client: its name.
            restorable: the steps that the client has checkpoints of.
            current: the step whose state the client is in.
            may_go_back: whether a side that has lost its checkpoints may undo the work of the other.

        Raises:
            HandshakeError: if there is no such state, or more than one checkpoint of a side would be undone.
            CheckpointError: if the server has checkpoints, and all are damaged.
        """
        recorded = self.steps.get(client, 0)
        theirs = {*restorable, current}
        if self.alone:
            ours = {*self.saved_steps(), self.server_step, 0}
            if max(theirs & ours, default=0) not in (self.server_step, 0):  # on the disk alone
                ours = {*intact_steps(self.folder, self.say), self.server_step, 0}
            common = max(theirs & ours, default=None)
            if common is None:
                raise HandshakeError(
                    f"run {self.name}: the client can go on from steps {sorted(theirs)}, the server from "
                    f"{sorted(ours)}; no state is common: start a new run"
                )
            self._check_kept(common, restorable, may_go_back)
            if common != self.server_step:
                self.go_back(common)
            self.steps = {client: common}
            return common
        if self.round is not None:
            if client not in self._missed:
                self.round.join(client)
            start = self.server_step
        elif self.training.halves == pb.PERSONAL:
            start = max((step for step in theirs if step <= recorded), default=0)
        else:
            start = min(self._journaled.get(client, 0), recorded)
        self._check_kept(start, restorable, may_go_back)
        self.steps[client] = start
        return start

    def hand_over(self, gone: str, client: str) -> None:
        """Let a client that comes in place of one that was revoked go on with its count of steps; no reply of its."""
        for of_client in (self.steps, self._journaled):
            if gone in of_client:
                of_client[client] = of_client.pop(gone)
        self._replies.pop(gone)
        self._states.pop(gone, None)
        self._missed.discard(gone)
        if self.round is not None:
            self.round.members.discard(gone)

    def _check_kept(self, start: int, restorable: Sequence[int], may_go_back: bool) -> None:
        """Refuse to undo what both sides had: the server saves first, so each has all but the other's newest."""
        theirs, ours = sorted(step for step in restorable if step), self._asked
        # another client may have saved between a step and its update in the shared journal
        known = start + 1 if self.training.halves == pb.SHARED else start
        undone = (theirs and known < theirs[0]) or (self.alone and len(ours) > 1 and start < ours[0])
        if undone and not may_go_back:
            raise HandshakeError(
                f"run {self.name}: the device has checkpoints of steps {theirs}, the server of {ours}: "
                "was one of the folders lost, emptied or replaced by a copy, or the run dropped? Put the newest back, "
                f"or say `hosl join --go-back`: both go on from step {start}, and what is later is deleted; another "
                "output_dir begins another run"
            )

    def saved_steps(self) -> list[int]:
        """The steps of the checkpoints on disk, ascending, damaged or not."""
        return checkpoint_steps(self.folder)

    def go_back(self, step: int) -> None:
        """Load the state of a checkpoint, or the base weights for step 0; everything later is dropped."""
        facts, self.journal = self.half.restore(self.folder, step)
        self.steps = cast(dict[str, int], facts.get("steps", {}))
        self._journaled = cast(dict[str, int], facts.get("journaled", {}))
        kept = [saved for saved in self.saved_steps() if saved <= step][-2:]
        self._asked = cast(list[int], facts.get("asked", kept))
        self.updates, self._saved = self.journal.last_step, dict(self._journaled)
        self.server_step = step
        self._replies.clear()
        self._weights.clear()
        self._missed.clear()
        if self.round is not None:
            self.round = Round(number=step + 1, expected=self.training.clients)

    def save(self, *, asked: bool) -> int:
        """Write a checkpoint of the present state; returns its step.

        One that no client asked for takes the place of the one before of that kind, never of those that a client has.
        """
        newest = max(self._asked, default=0)
        drop_checkpoints_after(self.folder, newest)
        facts: dict[str, object] = {"steps": self.steps, "journaled": self._journaled, "asked": self._asked}
        shared = self.journal if self.training.halves == pb.SHARED else None
        if self.server_step > newest:
            now = facts["asked"] = [*self._asked[-1:], self.server_step] if asked else self._asked
            self.half.save(self.folder, self.server_step, facts, shared, now)
            self._asked = now
        elif shared is not None and newest and self._journaled != self._saved:
            # another client saved between a step of this one and its update of the journal
            add_to_checkpoint(checkpoint_path(self.folder, newest), facts, shared.to_bytes())
        self._saved = dict(self._journaled)
        return self.server_step

    # ---- requests that change nothing ----

    def check_now(self, client: str, step: int, *, evaluation: bool = False) -> None:
        """Refuse a request for another state than the present one.

        Raises:
            StepError: if `step` is from the past or the future.
            SessionError: if the client's part of the round of `step` was taken, the last round is closed, or the run
                went back to a state without this client, or is not the one in memory any more.
        """
        recorded = self.steps.get(client)
        if self.let_go:
            raise SessionError(f"run {self.name} was let go of meanwhile; say hello again")
        if recorded is None:
            raise SessionError(
                f"run {self.name} went back to a checkpoint without client {client}; say hello again"
            )
        if self.round is not None:
            open_ = recorded < step <= self.round.number <= self.training.max_steps
            if not open_ and not evaluation:
                raise SessionError(
                    f"round {step} is closed, the run is in round {self.round.number}; say hello again"
                )
            return  # a slow client's step counts in the round that is open when it comes
        wanted = recorded + (0 if evaluation else 1)
        if step != wanted:
            when = "past" if step < wanted else "future"
            raise StepError(
                f"step {step} of client {client} is from the {when}: the server waits for step {wanted}"
            )

    def losses(self, questions: Sequence[Question]) -> list[list[float]]:
        """The mean losses of each question's activations, nats; several questions are answered together.

        Raises:
            StepError, SessionError: see `check_now`.
        """
        for question in questions:
            self.check_now(question.client, question.step)
        if len(questions) == 1:
            return [self.half.losses(questions[0].activations, questions[0].targets)]
        return self.half.losses_together([Asked(q.activations, q.targets) for q in questions])

    # ---- requests that change the half: once per (client, step) ----

    def step_together(self, questions: Sequence[Question]) -> list[Stepped]:
        """`step` of several clients; their gradients are added to the round together. Synchronous only if several.

        If it raises, nothing was added of any.
        """
        new = dict[str, tuple[Question, int]]()
        for question in questions if len(questions) > 1 else ():
            if self._replies.step_of(question.client) != question.step and question.client not in new:
                self.check_now(question.client, question.step)
                new[question.client] = (question, weight_of(question.targets))
        if len(new) > 1:
            parts = [Asked(q.activations, q.targets, weight, q.want_gradient) for q, weight in new.values()]
            for (q, weight), reply in zip(new.values(), self.half.contribute_together(parts), strict=True):
                self._weights[q.client] = (q.step, weight)
                self._replies.put(q.client, q.step, reply)
        return [
            self.step(q.client, q.step, q.activations[0], q.targets, want_gradient=q.want_gradient)
            for q in questions
        ]

    def step(
        self, client: str, step: int, activations: WireArray, targets: Targets, *, want_gradient: bool
    ) -> Stepped:
        """Execute a client's training step, or return the reply that this step got before."""
        if self.round is not None:
            examples = weight_of(targets)

            def contribute() -> Stepped:
                reply = self.half.contribute(activations, targets, examples, want_gradient)
                self._weights[client] = (step, examples)
                return reply

            return self._once(client, step, contribute, is_update=False)
        return self._once(
            client, step, lambda: self.half.step(activations, targets, self.server_step + 1, want_gradient)
        )

    def states_for_step(
        self, client: str, step: int, activations: WireArray, positions: AskedPositions
    ) -> tuple[WireArray, Callable[[WireArray, bool], Stepped]]:
        """The states of a step whose labels stay with the client, and the function that updates from their gradient."""
        in_round = self.round is not None
        if self._replies.step_of(client) == step:
            cached = self._replies.of(client)  # its gradient was taken at these states
            return self._states[client], lambda gradient, want_gradient: self._once(
                client, step, lambda: cached, is_update=not in_round
            )
        self.check_now(client, step)
        weight = weight_of(positions)
        begin = self.half.states_for_part if in_round else self.half.states_for_step
        self._states[client], finish = begin(activations, positions)

        def update(gradient: WireArray, want_gradient: bool) -> Stepped:
            def work() -> Stepped:
                if not in_round:
                    return finish(gradient, self.server_step + 1, want_gradient)
                reply = finish(gradient, weight, want_gradient)
                self._weights[client] = (step, weight)
                return reply

            return self._once(client, step, work, is_update=not in_round)

        return self._states[client], update

    def descend(self, client: str, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """Make a client's zeroth-order update of the server half, once."""
        self._once(client, step, lambda: self.half.descend(self.server_step + 1, seeds, coefficients))

    def _once(self, client: str, step: int, work: Callable[[], Any], *, is_update: bool = True) -> Any:
        """The reply that the step got before, else that of `work`; `is_update` says whether it updates the half.

        A client that went back to a checkpoint does its steps again: the newest one counts as done, though not twice.
        """
        if self.is_due(client, step):
            self._replies.put(client, step, work())
            self.server_step += is_update
        return self._counted(client, step, is_update=is_update)

    def is_due(self, client: str, step: int) -> bool:
        """Whether a step is to be executed, not answered from the cache; raises as `check_now`."""
        due = self._replies.step_of(client) != step
        if due:
            self.check_now(client, step)
        return due

    def answer_step(self, client: str, step: int, reply: Stepped | None = None) -> Stepped:
        """Note the reply to a step that was executed elsewhere, None: before; returns the reply to send."""
        if reply is not None:
            self._replies.put(client, step, reply)
            self.server_step += 1
        return self._counted(client, step, is_update=True)

    def _counted(self, client: str, step: int, *, is_update: bool) -> Any:
        reply = self._replies.of(client)
        if is_update:
            self.steps[client] = step
        if isinstance(reply, Stepped) and self.model.labels == pb.LABELS_AT_SERVER:
            self.last_loss = reply.loss
        return reply

    # ---- shared halves ----

    def submit(self, client: str, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """Append a client's update to the shared journal, once per step. For the sequential schedule."""
        if self._journaled.get(client, 0) < step <= self.steps.get(client, 0):
            if seeds:  # none, where every probe was rejected
                self.journal.append(self.updates + 1, seeds, scales)
                self.updates += 1
            self._journaled[client] = step

    def contribute(self, client: str, step: int, contribution: Contribution) -> Round | None:
        """Add a client's part, once per step, to the round that is open; returns the round. Synchronous only.

        None: the part of this step was counted before, or the last round is closed. The round waits again for a client
        that it was closed without, once it is at most one round behind.

        Raises:
            WireError: if its examples are not those of the client's Step of this step, rows or scored tokens.
        """
        assert self.round is not None, "only the synchronous schedule has rounds"
        if self.round.number > self.training.max_steps:
            self.steps[client] = self.server_step
            return None
        if not self.steps.get(client, 0) < step <= self.round.number:
            return None
        stepped, weight = self._weights.get(client, (None, 0))
        if stepped != step or weight != contribution.examples:
            raise WireError(
                f"client {client} hands in an update of {contribution.examples} examples for step {step}, whose Step "
                f"had {weight if stepped == step else 'not come yet: 0'} rows or scored tokens; the two must be equal"
            )
        self.round.add(client, contribution)
        if step >= self.round.number - 1:
            self._missed.discard(client)
            self.round.join(client)
        return self.round

    @property
    def grace_s(self) -> float:
        """The seconds that a round waits for the others after its first contribution.

        They are the run's grace, or half of a usual round if that is longer: devices that take minutes for a step are
        minutes apart, too. After a restart of the server it is the run's grace until three rounds are closed.
        """
        usual_s = median_low(self._lengths_s) if len(self._lengths_s) >= ROUNDS_NEEDED else 0.0
        return max(self.training.grace_s, SHARE_OF_A_ROUND * usual_s)

    def close_round(self, current: Round) -> list[str] | None:
        """Apply the mean over the clients that contributed; returns the names of those that did not.

        None, and nothing is done, if `current` is closed already.

        Raises:
            NonFiniteError: if the server's half cannot be updated; the round is closed, and the run goes on.
        """
        if self.round is None or self.round is not current:
            return None
        dropped = current.members - current.contributions.keys()
        members = current.members - dropped
        self._missed |= dropped
        self._lengths_s.append(current.length_s)
        self.round = Round(number=current.number + 1, expected=len(members), members=members)
        seeds, scales = current.mean_update()
        if seeds:
            self.journal.append(current.number, seeds, scales)
        self.updates = self.server_step = current.number
        self.steps |= dict.fromkeys(current.contributions, current.number)
        self.half.apply(current.number)
        return sorted(dropped)

    def updates_after(self, have: int) -> list[pb.Update]:
        """The updates of the shared journal that a client with the first `have` of them lacks.

        Kept for the next that lacks the same, as all clients of a round do: it may be 10,000 directions for each.

        Raises:
            WireError: if the journal has fewer than those.
        """
        if have > self.updates:
            raise WireError(
                f"run {self.name}: the client has {have} updates of a journal of {self.updates}: its half has gone "
                "another way; join again, it is then rebuilt from the journal"
            )
        asked = (self.journal, have, self.updates)
        if self._told is None or self._told[0] != asked:
            updates = [
                pb.Update(step=step, seeds=seeds, scales=scales)
                for step, seeds, scales in self.journal.updates(after=have)
            ]
            self._told = (asked, updates)
        return self._told[1]


class OwnQuestion(NamedTuple):
    """What a client with server adapters of its own asks of its part of a run."""

    run: ServedRun
    question: Question


def steps_together(bank: HostedBank, asked: Sequence[OwnQuestion]) -> list[Stepped | HoslError]:
    """`ServedRun.step` of several clients' parts of a run, by few passes; the reply or the error of each."""
    due, failed = dict[str, OwnQuestion](), dict[str, HoslError]()

    def note(one: OwnQuestion) -> None:
        if one.run.is_due(one.question.client, one.question.step):
            due.setdefault(one.question.client, one)  # a request that was repeated has the same reply

    errors = [_refusal(partial(note, one)) for one in asked]
    for some in _passes(
        list(due.values()), bank.at_once
    ):  # what one did is noted before the next, which may fail
        replies = bank.step_together([OwnAsked(q.client, _asked(q), run.server_step + 1) for run, q in some])
        for (run, q), reply in zip(some, replies, strict=True):
            if isinstance(reply, HoslError):
                failed[q.client] = reply
            else:
                run.answer_step(q.client, q.step, reply)
    return [
        error or failed.get(q.client) or run.answer_step(q.client, q.step)
        for (run, q), error in zip(asked, errors, strict=True)
    ]


def losses_together(bank: HostedBank, asked: Sequence[OwnQuestion]) -> list[list[float] | HoslError]:
    """`ServedRun.losses` of several clients' parts of a run, by few passes; the losses or the error of each."""
    errors = [
        _refusal(lambda one=one: one.run.check_now(one.question.client, one.question.step)) for one in asked
    ]
    now = [one.question for one, error in zip(asked, errors, strict=True) if error is None]
    found: list[list[float]] = []
    for some in _passes(now, bank.at_once):
        found += bank.losses_together([OwnAsked(q.client, _asked(q)) for q in some])
    left = iter(found)
    return [next(left) if error is None else error for error in errors]


def _asked(question: Question) -> Asked:
    return Asked(question.activations, question.targets, want_gradient=question.want_gradient)


def _refusal(check: Callable[[], object]) -> HoslError | None:
    """The error of a check; None: it passed."""
    try:
        check()
    except HoslError as error:
        return error
    return None


def _passes(asked: list[_Asked], most: int) -> Iterator[list[_Asked]]:
    """The questions in as many parts as there are passes."""
    return (asked[first : first + most] for first in range(0, len(asked), most))


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:80] if not isinstance(value, str) else json.dumps(value[:80])
