"""The runs that this server holds and the sessions of their clients; a session begins with Hello."""

import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict

from hosl.core.methods import METHODS
from hosl.errors import (
    AccessError,
    CheckpointError,
    FailureError,
    HandshakeError,
    LimitError,
    SessionError,
    StepError,
    WireError,
)
from hosl.service.hosted_half import OpenHalf
from hosl.service.operation.heard import Heard
from hosl.service.operation.live_files import read_progress, write_progress
from hosl.service.operation.now import ClientNow, RunNow
from hosl.service.operation.quota import Quota
from hosl.service.operation.stored import RUN_NAME, handshake_file, handshake_in, stored_runs
from hosl.service.runs import BASE, ServedRun
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import checkpoint_steps, intact_steps, newest_checkpoint
from hosl.system.readable import readable_count
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum

PROTOCOL = 1
_MOST_RESTORABLE = 1024
UNTRAINED = pb.Training(
    method=pb.FROZEN, distribution=pb.GAUSSIAN, trainable=pb.ALL, optimiser=pb.Optimiser(name=pb.SGD), max_steps=1,
    lora=pb.Lora(r=8, alpha=16), clients=1, grace_s=5.0,
)  # fmt: skip
"""The settings of a half that is only used."""
_MOST = {
    "max_steps": 2**31, "warmup_steps": 2**31, "learning_rate": 1e6, "clients": 4096, "grace_s": 86400.0,
    "lora.r": 1024, "lora.alpha": 2**20, "optimiser.momentum": 1.0, "optimiser.weight_decay": 1e6,
}  # fmt: skip
"""The largest value of each number of a Hello; each decides what a run costs in memory or time."""


@dataclass(frozen=True, slots=True)
class Session:
    """One client in one run, until it says hello again."""

    client: str
    run: ServedRun
    looks: bool = False
    """Whether it only reads: what a run has learned is used, and nobody's part of it changes."""

    def check_now(self, step: int, *, evaluation: bool = False) -> None:
        """Refuse a request for another state than the present one; as `ServedRun.check_now`.

        Raises:
            StepError: if a run that is looked at has gone on since the session began.
        """
        if not self.looks:
            self.run.check_now(self.client, step, evaluation=evaluation)
        elif step != self.run.server_step:
            raise StepError(
                f"the run has gone on from step {step} to {self.run.server_step} while it is used; wait until its "
                "training ends, then ask again"
            )


class Sessions:
    """The runs in memory and on disk, and the sessions since this process started."""

    def __init__(
        self,
        folder: Path,
        open_half: OpenHalf,
        say: Callable[[str], None] = lambda text: None,
        *,
        revoked: Callable[[str], bool] = lambda client: False,
        runs_at_once: int = 1,
        away_s: float = 600.0,
        seat_s: float = 30 * 86400.0,
        quota: Quota | None = None,
    ) -> None:
        """Begin without a run in memory.

        Args:
            folder: that of the service.
            open_half: opens the half for a Hello.
            say: is called with a line about each damaged checkpoint.
            revoked: says of a client's name whether it has lost its access: its seat is then free for another.
            runs_at_once: the runs in memory together.
            away_s: the seconds without a call after which a run makes room for another one.
            seat_s: the seconds without a call after which a client's seat in a full run is free for another.
            quota: of each client; None: the usual one.
        """
        self._quota, self._heard = quota or Quota(), Heard(folder / "runs", seat_s)
        self._over_quota: set[str] = set()
        """The runs whose last Save was refused for their size."""
        self._revoked = revoked
        self._folder, self._say = folder / "runs", say
        self._open_half, self._runs_at_once, self._away_s = open_half, runs_at_once, away_s
        self._incarnation = secrets.token_hex(8)  # so that no session of an earlier process is valid
        self._count = 0
        self.runs: dict[str, ServedRun] = {}
        self._sessions: dict[str, Session] = {}
        self._taken_over: dict[tuple[str, str], str] = {}
        """The last session of each (run, client) that ended because the same client said hello again."""
        self._used: Counter[str] = Counter()
        """Run -> the texts that are generated with its half now."""

    def of(self, client: str, where: pb.Where, *, reads: bool = False) -> Session:
        """The session that a request names; `reads` says of the request that it changes nothing.

        Raises:
            SessionError: if there is no such session, it is another client's, or its run was dropped.
            AccessError: if its client has said hello since: a process has one session, so this is another process.
        """
        session = self._sessions.get(where.session)
        dropped = (
            session is not None
            and session.run.name != BASE
            and handshake_file(session.run.folder.parent) is None
        )
        if session is not None and dropped:
            self._forget(session.run)
            session = None
        if session is None and (client, where.session) in [
            (c, s) for (_, c), s in list(self._taken_over.items())
        ]:
            raise AccessError(
                f"another process has said hello as client {client} since, and goes on in place of this one: a join "
                "line is for one device at a time, `hosl clients add` prints another"
            )
        if session is None or session.client != client:
            raise SessionError("this session is not known here (any more); say hello again")
        if session.looks and not reads:
            raise WireError("this session only looks at its run: it may ask for scores and states")
        self._heard.note(session.run.name, client)
        return session

    def leave(self, client: str, where: pb.Where) -> None:
        """End a session; a run without sessions makes room for another. Nothing that was trained is lost."""
        session = self._sessions.get(where.session)
        if session is not None and session.client == client:
            self._sessions.pop(where.session, None)

    def save(self, run: ServedRun, *, asked: bool) -> int:
        """Write a checkpoint of a run, as `ServedRun.save`; one that nobody asked for is never refused for its size.

        Raises:
            SessionError: if the owner has dropped the run. LimitError: if its client has more on disk than it may.
        """
        folder = run.folder.parent
        if run.name == BASE or handshake_file(folder) is None:
            if asked:
                raise SessionError(f"run {run.name} was dropped by the server's owner; say hello again")
            return run.server_step
        if asked and run.server_step not in run.saved_steps():
            with suppress(
                CheckpointError
            ):  # a handshake that is damaged names no client; what was trained is saved
                self._check_disk(run.name, (handshake_in(folder) or {}).get("first_client", ""))
        step = run.save(asked=asked)
        if handshake_file(folder) is None:  # dropped meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        return step

    def dropped(self) -> list[ServedRun]:
        """The runs in memory that the owner has dropped, without those of which a text is under way."""
        return [
            run
            for run in list(self.runs.values())
            if run.name != BASE and not self._used[run.name] and handshake_file(run.folder.parent) is None
        ]

    def forget_dropped(self) -> None:
        """Let the memory go of runs that the owner has dropped. Runs in the compute thread, so between two Hellos."""
        for run in self.dropped():
            self._forget(run)

    def now(self) -> list[RunNow]:
        """The runs in memory, and when their clients were heard."""
        return [self._run_now(run) for run in list(self.runs.values()) if run.name != BASE]

    def _run_now(self, run: ServedRun) -> RunNow:
        here = {session.client for session in list(self._sessions.values()) if session.run is run}
        heard, since = self._heard.clients(run.name), time.time() - self._away_s
        steps = dict(run.steps)
        return RunNow(
            name=run.name, step=run.server_step, max_steps=run.training.max_steps, loss=run.last_loss,
            expected=max(run.training.clients, 1),
            clients={
                name: ClientNow(steps.get(name, 0), heard.get(name), name in here and heard.get(name, 0.0) > since)
                for name in sorted({*here, *heard, *steps})
            },
        )  # fmt: skip

    def clients_of(self, run: ServedRun) -> list[str]:
        """The names of the clients that have a session in a run, sorted; those that were revoked are left out."""
        names = {session.client for session in list(self._sessions.values()) if session.run is run}
        return sorted(name for name in names if not self._revoked(name))

    def hello(self, client: str, request: pb.HelloRequest) -> tuple[str, int, ServedRun]:
        """Find or open the run and settle on a state; returns the session, the step to go on from, and the run.

        Runs in the compute thread: it may load and move weights.

        Raises:
            WireError: if the request is malformed. HandshakeError: if the two sides do not fit.
            LimitError: if this server is busy with other runs.
        """
        if request.look:
            return self._look(client, request)
        if request.protocol != PROTOCOL:
            raise HandshakeError(
                f"this server speaks protocol {PROTOCOL}, the client {request.protocol}; install the same version of "
                "hosl on both sides"
            )
        if not RUN_NAME.fullmatch(request.run):
            raise WireError(
                f"run name {request.run[:80]!r}: 1 to 64 of a-z, 0-9, dot, hyphen, underscore are allowed"
            )
        if not re.fullmatch("(?:[0-9a-f]{64})?", request.training.labels_digest):
            raise WireError("labels_digest is no SHA-256 in hexadecimal")
        if max([request.current, *request.restorable[:_MOST_RESTORABLE]]) > 2**31:
            raise WireError("a step lies beyond 2**31")
        if len(request.restorable) > _MOST_RESTORABLE:
            raise WireError(
                f"{len(request.restorable)} checkpoints are told, a client keeps fewer than {_MOST_RESTORABLE}"
            )
        check_numbers(request.training)
        folder = self._folder / request.run
        stored = handshake_in(folder)
        run, roster, gone = self._find_or_open(client, request, stored)
        try:
            run.agree(request.model, request.training)
            if gone:
                run.hand_over(gone, client)
            start = run.settle(client, request.restorable, request.current, may_go_back=request.may_go_back)
        except HandshakeError:
            if gone:
                run.hand_over(client, gone)  # back: the seat is still free
            if stored is None:  # begun by this Hello, and nothing was trained in it
                self._forget(run)
                shutil.rmtree(folder)
            raise
        if stored is None or roster != stored.get("clients"):
            heirs: dict[str, str] = {} if stored is None else stored.get("heirs", {})
            facts: dict[str, Any] = {
                "model": MessageToDict(run.model), "training": MessageToDict(run.training),
                "first_client": roster[0], "clients": roster,
                "heirs": {old: new for old, new in heirs.items() if old != client} | ({gone: client} if gone else {}),
            }  # fmt: skip
            whole_file(folder / "handshake.json", msgspec.json.format(msgspec.json.encode(facts), indent=1))
        if gone:
            self._end_sessions(run, gone)
            self._heard.left(run.name, gone)
        self._heard.note(run.name, client)
        for before in self._end_sessions(run, client):
            self._taken_over[run.name, client] = before
        return self._begun(Session(client, run)), start, run

    def _look(self, client: str, request: pb.HelloRequest) -> tuple[str, int, ServedRun]:
        """Begin a session that only reads, of a run of this client, or of the half as it was split."""
        ask = pb.AskGenerate(
            protocol=request.protocol, model=request.model, run=request.run, base=not request.run
        )
        run = self.for_use(client, ask)
        self._heard.note(run.name, client)
        return self._begun(Session(client, run, looks=True)), run.server_step, run

    def _begun(self, session: Session) -> str:
        """The name of a new session."""
        self._count += 1
        name = f"{self._incarnation}.{self._count}"
        self._sessions[name] = session
        return name

    def _find_or_open(
        self, client: str, request: pb.HelloRequest, stored: dict[str, Any] | None
    ) -> tuple[ServedRun, list[str], str | None]:
        """The run of a Hello; the clients that take part in it, this one included; the one whose seat it takes."""
        folder, model, training = self._folder / request.run, request.model, request.training
        run = self.runs.get(request.run)
        if run is not None and stored is None:
            self._forget(run)  # dropped by the owner
            run = None
        if stored is not None:
            model = ParseDict(stored["model"], pb.Model())
            training = ParseDict(stored["training"], pb.Training())
        roster: list[str] = [] if stored is None else stored["clients"]
        seats, gone = max(training.clients, 1), None
        if client not in roster:
            if len(roster) >= seats:
                gone = next(filter(self._revoked, roster), None) or self._heard.vanished(request.run, roster)
                if gone is None:
                    heir = (stored or {}).get("heirs", {}).get(client)
                    lost = (
                        f"; the seat of {client}, which was not heard for long, went to {heir}"
                        if heir
                        else ""
                    )
                    raise HandshakeError(
                        f"run {request.run} is for {seats} clients and has {', '.join(sorted(roster))}{lost}; "
                        "set clients.count higher for all, or choose another output_dir"
                    )
            roster = [client if name == gone else name for name in roster] + ([] if gone else [client])
        if run is not None and request.run in self._over_quota and stored is not None and not run.finished:
            self._check_disk(request.run, stored["first_client"])  # else it would train until its next Save
        if run is None:
            check_training(training)
            self._make_room()
            if stored is None:
                self._count_runs(client)
                self._check_disk(request.run, client)
            run = self._opened(request.run, model, training)
            if stored is not None and not run.finished:
                self._check_disk(request.run, stored["first_client"])
            if stored is None:
                shutil.rmtree(folder, ignore_errors=True)  # what a dropped run's last call may have left
                folder.mkdir(parents=True)
        return run, roster, gone

    def _opened(self, name: str, model: pb.Model, training: pb.Training) -> ServedRun:
        """A run in memory, at its newest intact checkpoint if it has one. Requires: there is room."""
        half = self._open_half(model, training)
        run = ServedRun(name, model, training, half, self._folder / name / "checkpoints", self._say)
        stored = handshake_in(run.folder.parent)
        if stored is not None and (saved := next(intact_steps(run.folder, self._say), None)):
            run.go_back(saved)
            for old, new in stored.get("heirs", {}).items():  # since the checkpoint
                run.hand_over(old, new)
        progress = read_progress(run.folder.parent)
        if progress is not None and progress.step == run.server_step:
            run.last_loss = progress.loss
        self._heard.opened(name, progress)
        self.runs[name] = run
        return run

    # ---- use of a half, without a session ----

    def for_use(self, client: str, ask: pb.AskGenerate) -> ServedRun:
        """The run whose half a client generates with, opened if it is not in memory: a named one, or its newest.

        Runs in the compute thread. Nothing of the run changes.

        Raises:
            WireError: if the request is malformed. HandshakeError: if there is no such run, or the halves do not fit.
            AccessError: if the client takes no part in the run.
            LimitError: if this server is busy with other runs.
        """
        if ask.protocol != PROTOCOL:
            raise HandshakeError(
                f"this server speaks protocol {PROTOCOL}, the client {ask.protocol}; install the same version of hosl "
                "on both sides"
            )
        name = self._named(client, ask)
        run = self.runs.get(name)
        if run is not None and (name == BASE and run.model.dtype != ask.model.dtype):
            self._forget(run)
            run = None
        if run is None:
            stored = handshake_in(self._folder / name) or {}
            model = ParseDict(stored["model"], pb.Model()) if stored else ask.model
            training = ParseDict(stored["training"], pb.Training()) if stored else UNTRAINED
            check_same_halves(model, ask.model)
            self._make_room()
            run = self._opened(name, model, training)
        check_same_halves(run.model, ask.model)
        return run

    @contextmanager
    def in_use(self, run: ServedRun) -> Iterator[None]:
        """Keep a run in memory while a text goes on in its half."""
        self._used[run.name] += 1
        try:
            yield
        finally:
            self._used[run.name] -= 1

    def _named(self, client: str, ask: pb.AskGenerate) -> str:
        """The name of the run that a client asks for."""
        stored = {name: told["clients"] for name, told in stored_runs(self._folder) if told is not None}
        mine = [name for name, clients in stored.items() if client in clients]
        if ask.base:
            return BASE
        if not ask.run:
            return max(mine, key=self._changed_s, default=BASE)
        if ask.run not in stored:
            raise HandshakeError(
                f"no run is called {ask.run[:80]!r} here; those of client {client} are {', '.join(mine) or 'none'}"
            )
        if client not in stored[ask.run]:
            raise AccessError(
                f"client {client} takes no part in run {ask.run}, which is of {', '.join(stored[ask.run])}; use the "
                "join line of one of these"
            )
        return ask.run

    def _changed_s(self, name: str) -> float:
        """The time of a run's newest checkpoint, or of its last call in this process if that is later."""
        folder = newest_checkpoint(self._folder / name / "checkpoints") or self._folder / name
        return max(folder.stat().st_mtime, time.time() - self._heard.silent_s(name))

    def _make_room(self) -> None:
        """Save and drop runs that are finished, or whose clients have left or were not heard of, until one more fits.

        A run that was dropped from memory is found on disk by the next Hello.
        """
        while len(self.runs) >= self._runs_at_once:
            left = next(
                (
                    run
                    for run in self.runs.values()
                    if not self._used[run.name] and (run.finished or self._is_left(run))
                ),
                None,
            )
            if left is None:
                busy = ", ".join(
                    f"{run.name} ({', '.join(self.clients_of(run)) or 'texts and scores of it'})"
                    for run in self.runs.values()
                )
                raise LimitError(
                    f"this server has room for {readable_count(len(self.runs), 'run')} and is busy with {busy}; wait "
                    f"until one is finished or silent for {self._away_s:g} s, or ask its owner for `hosl runs drop` or "
                    "`hosl serve --runs-at-once`"
                )
            self.save(left, asked=False)
            if left.name != BASE:
                with suppress(OSError):  # a hint for `hosl runs`
                    write_progress(left.folder.parent, self._run_now(left))
            self._forget(left)

    def _is_left(self, run: ServedRun) -> bool:
        return not self.clients_of(run) or self._heard.silent_s(run.name) > self._away_s

    def _forget(self, run: ServedRun) -> None:
        self.runs.pop(run.name, None)
        self._heard.closed(run.name)
        self._end_sessions(run)

    def _end_sessions(self, run: ServedRun, client: str | None = None) -> list[str]:
        """End the sessions of a run, or those in which one client trains it; returns their names."""
        held = list(self._sessions.items())  # the event loop may end one meanwhile
        ended = [
            name
            for name, session in held
            if session.run is run and (client is None or (client == session.client and not session.looks))
        ]
        for name in ended:
            self._sessions.pop(name, None)
        return ended

    def _count_runs(self, client: str) -> None:
        """Delete a client's runs that have no checkpoint; refuse one run too many."""
        begun = [
            name
            for name, stored in stored_runs(self._folder)
            if stored is not None and stored["first_client"] == client and name not in self.runs
        ]
        for name in [name for name in begun if not checkpoint_steps(self._folder / name / "checkpoints")]:
            shutil.rmtree(self._folder / name)
            begun.remove(name)
        self._quota.check_count(client, len(begun))

    def _check_disk(self, name: str, first_client: str) -> None:
        self._over_quota.add(name)
        self._quota.check_disk(self._folder, name, first_client)
        self._over_quota.discard(name)


def check_same_halves(ours: pb.Model, theirs: pb.Model) -> None:
    """Refuse a client half of another split; its dtype may be another.

    Raises:
        HandshakeError: naming the first difference with both values.
    """
    for name in ("family", "cut", "base_digest", "client_digest", "server_digest", "labels"):
        mine, other = str(getattr(ours, name))[:16], str(getattr(theirs, name))[:16]
        if getattr(ours, name) != getattr(theirs, name):
            raise HandshakeError(
                f"the halves do not fit: {name} is {mine} on the server and {other} on the client; use both folders of "
                "one `hosl split`"
            )


def save_all(sessions: Sessions) -> None:
    """Save every run in memory, though no client asked for it.

    Raises:
        FailureError: the first of those that could not be saved, once the others are.
    """
    failed: list[FailureError] = []
    for run in list(sessions.runs.values()):
        try:
            sessions.save(run, asked=False)
        except FailureError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def check_numbers(training: pb.Training) -> None:
    """Refuse numbers that no run has, before anything is made by them.

    Raises:
        HandshakeError: naming the setting.
    """
    for path, most in _MOST.items():
        value: Any = reduce(getattr, path.split("."), training)
        if not 0 <= value <= most:
            raise HandshakeError(f"{path} must lie in 0..{most:g}, got {value}")
    targets = training.lora.target_modules
    if len(targets) > 64 or any(len(name) > 64 for name in targets):
        raise HandshakeError(
            f"lora.target_modules: at most 64 names of 64 characters, got {len(targets)} names"
        )


def check_training(training: pb.Training) -> None:
    """Refuse settings that contradict each other, whoever sent them.

    Raises:
        HandshakeError: naming the settings.
    """
    if training.max_steps < 1 or not 0 <= training.learning_rate < float("inf"):
        raise HandshakeError(
            f"max_steps must be >= 1 and the learning rate a number >= 0, got {training.max_steps} and "
            f"{training.learning_rate}"
        )
    try:
        method = METHODS[from_enum(pb.Method, training.method)]
    except WireError as cause:
        raise HandshakeError(f"method: {cause}") from cause
    if training.order == pb.SYNCHRONOUS and method.server != "first-order":
        raise HandshakeError(
            f"the synchronous schedule needs a first-order server, method is {method.name}; use sequential"
        )
    if training.halves == pb.SHARED and method.client_state == "weights":
        raise HandshakeError(
            f"shared client halves need a journal, and a client of method {method.name} has none; use personal"
        )
