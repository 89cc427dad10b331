"""One run as the server remembers it: its half, each client's step, the last answers, the shared journal, checkpoints.

Every method that reads or changes the half runs in the compute thread (`Scheduler.run`), one after the other: that is
the lock. A state-changing question carries (client, step). The step after the recorded one is done; the recorded one is
answered from the cache; any other is refused. Which state both sides go on from is settled in `hello`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hosl.core.journal import Journal
from hosl.core.targets import PositionTargets, Targets
from hosl.errors import HandshakeError, SessionError, StepError
from hosl.service.hosting import HostedHalf, Stepped
from hosl.service.rounds import Contribution, Round
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray


@dataclass
class ServedRun:
    """One run. `name` and `training` never change."""

    name: str
    model: pb.Model
    training: pb.Training
    half: HostedHalf
    folder: Path
    """Of its checkpoints."""
    steps: dict[str, int] = field(default_factory=dict)
    """The last step of each client that changed the half, or that a Hello settled on."""
    journal: Journal = field(default_factory=Journal)
    """Shared halves: every client's updates, in the one order in which all clients apply them."""
    updates: int = 0
    """How many updates the shared journal holds; an update's number is its step in the journal."""
    server_step: int = 0
    """How many updates the server half has had."""
    last_loss: float | None = None
    round: Round | None = None
    """The round that is gathering, under the synchronous schedule."""
    _answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    _states: dict[str, WireArray] = field(default_factory=dict)
    _journaled: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.training.order == pb.SYNCHRONOUS:
            self.round = Round(number=1, expected=self.training.clients)

    @property
    def alone(self) -> bool:
        """Whether one client trains this run, so that both sides can go back together."""
        return self.training.clients <= 1

    @property
    def finished(self) -> bool:
        """Whether every client that came has done its last step."""
        return bool(self.steps) and all(step >= self.training.max_steps for step in self.steps.values())

    # ---- Hello: from which state both go on ----

    def agree(self, model: pb.Model, training: pb.Training) -> None:
        """Refuse another model or other settings than the run's.

        Raises:
            HandshakeError: naming the first difference with both values.
        """
        for ours, theirs in ((self.model, model), (self.training, training)):
            for field_ in ours.DESCRIPTOR.fields:
                mine, other = getattr(ours, field_.name), getattr(theirs, field_.name)
                if mine != other:
                    raise HandshakeError(
                        f"run {self.name}: the server has {field_.name} = {_shown(mine)}, this client {_shown(other)}; "
                        "give both the same config, or choose another output_dir for another run"
                    )

    def settle(self, client: str, restorable: Sequence[int], current: int) -> int:
        """The step after which server and client go on.

        Alone: the newest state that both have; the server goes back to it. With others: the server never goes back for
        one client; shared halves follow the journal, a personal half goes back to what the server has seen of it.

        Raises:
            HandshakeError: if there is no such state.
        """
        recorded = self.steps.get(client, 0)
        theirs = {*restorable, current}
        if self.alone:
            mine = {*self.saved_steps(), self.server_step, 0}
            common = max(theirs & mine, default=None)
            if common is None:
                raise HandshakeError(
                    f"run {self.name}: the client can go on from steps {sorted(theirs)}, the server from "
                    f"{sorted(mine)}; no state is common: start a new run"
                )
            if common != self.server_step:
                self.go_back(common)
            self.steps = {client: common}
            return common
        if self.round is not None:
            self.round.join(client)
            recorded = self.round.number - 1
        elif self.training.halves == pb.PERSONAL:
            recorded = max((step for step in theirs if step <= recorded), default=0)
        self.steps[client] = recorded
        return recorded

    def saved_steps(self) -> list[int]:
        """Steps of the checkpoints on disk."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def go_back(self, step: int) -> None:
        """Take the state of a checkpoint, 0 for the base weights; what was later is gone."""
        facts, self.journal = self.half.restore(self.folder, step)
        self.steps = cast(dict[str, int], facts.get("steps", {}))
        self._journaled = cast(dict[str, int], facts.get("journaled", {}))
        self.updates = self.journal.last_step
        self.server_step = step
        self._answers.clear()
        if self.round is not None:
            self.round = Round(number=step + 1, expected=self.training.clients)

    def save(self) -> int:
        """Write a checkpoint of the state at hand; returns its step."""
        if self.server_step and self.server_step not in self.saved_steps():
            facts: dict[str, object] = {"steps": self.steps, "journaled": self._journaled}
            shared = self.journal if self.training.halves == pb.SHARED else None
            self.half.save(self.folder, self.server_step, facts, shared)
        return self.server_step

    # ---- questions that change nothing ----

    def check_now(self, client: str, step: int, *, evaluation: bool = False) -> None:
        """Refuse a question about another state than the one at hand.

        Raises:
            StepError: if `step` is from the past or the future. SessionError: if its round was closed without it.
        """
        recorded = self.steps.get(client)
        if recorded is None:
            raise SessionError(
                f"run {self.name} went back to a checkpoint without client {client}; say hello again"
            )
        if self.round is not None:
            if step + int(evaluation) != self.round.number and not evaluation:
                raise SessionError(
                    f"round {step} is closed, the run is in round {self.round.number}; say hello again"
                )
            return
        wanted = recorded + (0 if evaluation else 1)
        if step != wanted:
            when = "past" if step < wanted else "future"
            raise StepError(
                f"step {step} of client {client} is from the {when}: the server waits for step {wanted}"
            )

    # ---- questions that change the half: once per (client, step) ----

    def step(
        self, client: str, step: int, activations: WireArray, targets: Targets, *, want_gradient: bool
    ) -> Stepped:
        """The training step of a client, or the answer that it was given before."""
        if self.round is not None:
            self.check_now(client, step)
            examples = len(targets.mask)
            return self._once(
                client,
                step,
                lambda: self.half.contribute(activations, targets, examples, want_gradient),
                counts=False,
            )
        return self._once(
            client, step, lambda: self.half.step(activations, targets, self.server_step + 1, want_gradient)
        )

    def states_for_step(
        self, client: str, step: int, activations: WireArray, positions: PositionTargets
    ) -> tuple[WireArray, Callable[[WireArray, bool], Stepped]]:
        """The states of a step whose labels stay with the client, and what makes the update from their gradient."""
        answered = self._answers.get(client)
        if answered is not None and answered[0] == step:  # the first answer's states belong to its gradient
            return self._states[client], lambda gradient, want_gradient: answered[1]
        self.check_now(client, step)
        states, finish = self.half.states_for_step(activations, positions)
        self._states[client] = states

        def update(gradient: WireArray, want_gradient: bool) -> Stepped:
            return self._once(client, step, lambda: finish(gradient, self.server_step + 1, want_gradient))

        return states, update

    def descend(self, client: str, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """A zeroth-order server's update."""
        self._once(client, step, lambda: self.half.descend(self.server_step + 1, seeds, coefficients))

    def _once(self, client: str, step: int, work: Callable[[], Any], *, counts: bool = True) -> Any:
        if self._answers.get(client, (None,))[0] == step:
            return self._answers[client][1]
        self.check_now(client, step)
        answer = work()
        if counts:
            self.server_step += 1
            self.steps[client] = step
        self._answers[client] = (step, answer)
        if isinstance(answer, Stepped) and self.model.labels == pb.LABELS_AT_SERVER:
            self.last_loss = answer.loss
        return answer

    # ---- shared halves ----

    def submit(self, client: str, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """Sequential schedule: put a client's update at the end of the shared journal, once."""
        if seeds and self._journaled.get(client, 0) < step:
            self.journal.append(self.updates + 1, seeds, scales)
            self.updates += 1
            self._journaled[client] = step

    def contribute(self, client: str, step: int, contribution: Contribution) -> bool:
        """Synchronous schedule: a client's part of the round; returns whether it came too late."""
        assert self.round is not None, "only the synchronous schedule has rounds"
        if step != self.round.number:
            return True
        self.round.contributions[client] = contribution
        return False

    def close_round(self) -> list[str]:
        """Apply the mean over the clients that contributed; returns the names of those that did not."""
        assert self.round is not None, "only the synchronous schedule has rounds"
        self.half.apply(self.round.number)
        seeds, scales = self.round.mean_update()
        if seeds:
            self.journal.append(self.round.number, seeds, scales)
        self.updates = self.server_step = self.round.number
        dropped = sorted(self.round.members - self.round.contributions.keys())
        for client in self.round.contributions:
            self.steps[client] = self.round.number
        members = self.round.members - set(dropped)
        self.round = Round(number=self.round.number + 1, expected=len(members), members=members)
        return dropped

    def updates_after(self, have: int) -> list[pb.Update]:
        """The shared journal's updates that a client with `have` of them lacks."""
        return [
            pb.Update(step=step, seeds=seeds, scales=scales)
            for step, seeds, scales in self.journal.updates(after=have)
        ]


def _shown(value: Any) -> str:
    return " ".join(str(value).split())[:80] if not isinstance(value, str) else json.dumps(value[:80])
