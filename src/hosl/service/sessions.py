"""The runs that this server holds and the sessions of their clients; a session begins with Hello."""

import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, cast

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from hosl.core.methods import METHODS
from hosl.errors import (
    AccessError,
    CheckpointError,
    ConfigError,
    HandshakeError,
    LimitError,
    SessionError,
    StepError,
    WireError,
)
from hosl.service.hosted_half import HostedBank, HostedHalf, OpenHalf
from hosl.service.runs import BASE, CLIENTS, ServedRun, checkpoints_below, saved_steps
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import intact_steps, newest_checkpoint
from hosl.system.readable import readable_count
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum

PROTOCOL = 1
PERSONAL_PROTOCOL = 2
"""The protocol of a Hello with server adapters of each client: a server that knows none must not overlook them."""
RUNS_PER_CLIENT = 100
"""The runs with checkpoints that one client may have begun; the owner makes room by `hosl runs drop`."""
_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
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
    ) -> None:
        """`revoked` says of a client's name whether it has lost its access: its seat is then free for another."""
        self._revoked = revoked
        self._folder, self._say = folder / "runs", say
        self._open_half, self._runs_at_once, self._away_s = open_half, runs_at_once, away_s
        self._heard_s: dict[str, float] = {}
        """The time of the last call in each run in memory, by a monotonic clock."""
        self._incarnation = secrets.token_hex(8)  # so that no session of an earlier process is valid
        self._count = 0
        self.runs: dict[str, ServedRun] = {}
        """The runs in memory by name; where each client has adapters of its own, each client's part NAME/CLIENT."""
        self._banks: dict[str, HostedBank] = {}
        """Run -> what its clients' parts share."""
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
            session is not None and session.run.name != BASE and _handshake_file(session.run.home) is None
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
        self._heard_s[session.run.name] = time.monotonic()
        return session

    def leave(self, client: str, where: pb.Where) -> None:
        """End a session; a run without sessions makes room for another. Nothing that was trained is lost."""
        session = self._sessions.get(where.session)
        if session is not None and session.client == client:
            self._sessions.pop(where.session, None)

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
        _check_protocol(request.protocol, personal=request.training.personal_server)
        if not _RUN_NAME.fullmatch(request.run):
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
        stored = _stored_handshake(folder)
        run, roster, gone = self._find_or_open(client, request, stored)
        try:
            run.agree(request.model, request.training)
            if gone:
                run.hand_over(gone, client)
            start = run.settle(client, request.restorable, request.current, may_go_back=request.may_go_back)
        except HandshakeError:
            if gone:
                run.hand_over(client, gone)  # back: the seat is still free
            if stored is None or (run.client and (gone or client not in stored["clients"])):
                self._forget(run)  # begun by this Hello, and nothing was trained in it
            if stored is None:
                shutil.rmtree(folder)
            elif gone and run.client:
                self._move(folder, client, gone)
            raise
        if stored is None or roster != stored.get("clients"):
            facts: dict[str, Any] = {
                "model": MessageToDict(run.model), "training": MessageToDict(run.training),
                "first_client": roster[0], "clients": roster,
                "heirs": ({} if stored is None else stored.get("heirs", {})) | ({gone: client} if gone else {}),
            }  # fmt: skip
            whole_file(folder / "handshake.json", msgspec.json.format(msgspec.json.encode(facts), indent=1))
        self._heard_s[run.name] = time.monotonic()
        for before in self._end_sessions(run, client):
            self._taken_over[run.name, client] = before
        return self._begun(Session(client, run)), start, run

    def _look(self, client: str, request: pb.HelloRequest) -> tuple[str, int, ServedRun]:
        """Begin a session that only reads, of a run of this client, or of the half as it was split."""
        ask = pb.AskGenerate(
            protocol=request.protocol, model=request.model, run=request.run, base=not request.run
        )
        run = self.for_use(client, ask)
        self._heard_s[run.name] = time.monotonic()
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
        if stored is None:
            for part in self._parts(request.run):
                self._forget(part)  # dropped by the owner
        else:
            model = ParseDict(stored["model"], pb.Model())
            training = ParseDict(stored["training"], pb.Training())
        roster: list[str] = [] if stored is None else stored["clients"]
        seats, gone = max(training.clients, 1), None
        if client not in roster:
            if len(roster) >= seats:
                gone = next(filter(self._revoked, roster), None)
                if gone is None:
                    raise HandshakeError(
                        f"run {request.run} is for {seats} clients and has {', '.join(sorted(roster))}; "
                        "set clients.count higher for all, or choose another output_dir"
                    )
            roster = [client if name == gone else name for name in roster] + ([] if gone else [client])
        if gone and training.personal_server:
            self._move(folder, gone, client)
        run = self.runs.get(_name_of(request.run, training, client))
        if run is None:
            check_training(training)
            if not self._parts(request.run):
                self._make_room()
            if stored is None:
                self._count_runs(client)
            run = self._opened(request.run, model, training, client)
            if stored is None:
                shutil.rmtree(folder, ignore_errors=True)  # what a dropped run's last call may have left
                folder.mkdir(parents=True)
        return run, roster, gone

    def _parts(self, name: str) -> list[ServedRun]:
        """What is in memory of a run: the run, or its clients' parts."""
        return [run for run in list(self.runs.values()) if run.of == name]

    def _move(self, folder: Path, client: str, heir: str) -> None:
        """Give a client's part of the run in `folder` to another client; nothing of it need be in memory."""
        for part in self._parts(folder.name):
            if part.client == client:
                self._save_and_forget(part)
        parts = folder / CLIENTS
        if (parts / client).is_dir():
            shutil.rmtree(parts / heir, ignore_errors=True)
            (parts / client).rename(parts / heir)

    def _opened(self, of: str, model: pb.Model, training: pb.Training, client: str) -> ServedRun:
        """A run in memory, or a client's part of it, at its newest intact checkpoint. Requires: there is room."""
        half, name = self._half(of, model, training, client), _name_of(of, training, client)
        folder = checkpoints_below(self._folder / of, training, client)
        own = client if training.personal_server else ""
        run = ServedRun(name, model, training, half, folder, self._say, own)
        stored = _stored_handshake(run.home)
        if stored is not None and (saved := next(intact_steps(run.folder, self._say), None)):
            run.go_back(saved)
            for old, new in stored.get("heirs", {}).items():  # since the checkpoint
                run.hand_over(old, new)
        self.runs[name] = run
        for part in self._parts(of):  # else all clients that ever came would stay in memory
            if part is not run and part.client and not self._used[part.name] and self._is_left(part):
                self._save_and_forget(part)
        return run

    def _save_and_forget(self, run: ServedRun) -> None:
        run.save(asked=False)
        self._forget(run)

    def _half(self, of: str, model: pb.Model, training: pb.Training, client: str) -> HostedHalf:
        """A half at its base weights; where each client has adapters of its own, over what they share."""
        if not training.personal_server:
            return cast(HostedHalf, self._open_half(model, training))
        if of not in self._banks:
            self._banks[of] = cast(HostedBank, self._open_half(model, training))
        return self._banks[of].of(client)

    def bank(self, run: ServedRun) -> HostedBank | None:
        """What the half of a client shares with those of others, which may compute together; None: nothing."""
        computes_losses = run.model.labels == pb.LABELS_AT_SERVER
        return self._banks.get(run.of) if run.client and computes_losses else None

    # ---- use of a half, without a session ----

    def for_use(self, client: str, ask: pb.AskGenerate) -> ServedRun:
        """The run whose half a client generates with, opened if it is not in memory: a named one, or its newest.

        Runs in the compute thread. Nothing of the run changes.

        Raises:
            WireError: if the request is malformed. HandshakeError: if there is no such run, or the halves do not fit.
            AccessError: if the client takes no part in the run.
            LimitError: if this server is busy with other runs.
        """
        _check_protocol(ask.protocol, personal=False)
        of = self._named(client, ask)
        stored = _stored_handshake(self._folder / of) or {}
        training = ParseDict(stored["training"], pb.Training()) if stored else UNTRAINED
        run = self.runs.get(_name_of(of, training, client))
        if run is not None and (of == BASE and run.model.dtype != ask.model.dtype):
            self._forget(run)
            run = None
        if run is None:
            model = ParseDict(stored["model"], pb.Model()) if stored else ask.model
            check_same_halves(model, ask.model)
            if not self._parts(of):
                self._make_room()
            run = self._opened(of, model, training, client)
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
            return max(mine, key=lambda name: self._changed_s(name, client), default=BASE)
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

    def _changed_s(self, name: str, client: str) -> float:
        """The time of the newest checkpoint of a client's run, or of its last call here if that is later."""
        stored = _stored_handshake(self._folder / name) or {}
        training = ParseDict(stored.get("training", {}), pb.Training())
        checkpoints = checkpoints_below(self._folder / name, training, client)
        folder = newest_checkpoint(checkpoints) or self._folder / name
        silent_s = time.monotonic() - self._heard_s.get(_name_of(name, training, client), float("-inf"))
        return max(folder.stat().st_mtime, time.time() - silent_s)

    def _make_room(self) -> None:
        """Save and drop runs that are finished, or whose clients have left or were not heard of, until one more fits.

        A run that was dropped from memory is found on disk by the next Hello.
        """
        while len(names := dict.fromkeys(run.of for run in self.runs.values())) >= self._runs_at_once:
            left = next(filter(self._may_go, names), None)
            if left is None:
                busy = ", ".join(
                    f"{run.name} ({', '.join(self.clients_of(run)) or 'texts and scores of it'})"
                    for run in self.runs.values()
                )
                raise LimitError(
                    f"this server has room for {readable_count(len(names), 'run')} and is busy with {busy}; wait "
                    f"until one is finished or silent for {self._away_s:g} s, or ask its owner for `hosl runs drop` or "
                    "`hosl serve --runs-at-once`"
                )
            for part in self._parts(left):
                self._save_and_forget(part)

    def _may_go(self, name: str) -> bool:
        return all(
            not self._used[run.name] and (run.finished or self._is_left(run)) for run in self._parts(name)
        )

    def _is_left(self, run: ServedRun) -> bool:
        return not self.clients_of(run) or time.monotonic() - self._heard_s[run.name] > self._away_s

    def _forget(self, run: ServedRun) -> None:
        self.runs.pop(run.name, None)
        run.let_go = True
        self._end_sessions(run)
        if run.client:
            self._banks[run.of].forget(run.client)
            if not self._parts(run.of):
                del self._banks[run.of]

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
            if stored is not None and stored["first_client"] == client and not self._parts(name)
        ]
        for name in [name for name in begun if not saved_steps(self._folder / name)]:
            shutil.rmtree(self._folder / name)
            begun.remove(name)
        if len(begun) >= RUNS_PER_CLIENT:
            raise LimitError(
                f"client {client} has begun {len(begun)} runs here, {RUNS_PER_CLIENT} are allowed; the server's owner "
                "makes room by `hosl runs drop NAME`"
            )


def _name_of(run: str, training: pb.Training, client: str) -> str:
    """The name in memory of a run, or of a client's part of it."""
    return f"{run}/{client}" if training.personal_server else run


def _check_protocol(told: int, *, personal: bool) -> None:
    spoken = PERSONAL_PROTOCOL if personal else PROTOCOL
    if told != spoken:
        raise HandshakeError(
            f"this server speaks protocol {spoken}, the client {told}; install the same version of hosl on both sides"
        )


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


def stored_runs(folder: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Name and handshake of every run below the folder `runs` of a service, by name; None: the file is damaged."""
    names = sorted(path.name for path in folder.glob("*") if _RUN_NAME.fullmatch(path.name))
    runs: list[tuple[str, dict[str, Any] | None]] = []
    for name in names:
        try:
            stored = _stored_handshake(folder / name)
        except CheckpointError:
            runs.append((name, None))
        else:
            runs += [] if stored is None else [(name, stored)]
    return runs


def stored_handshake(folder: Path, name: str) -> dict[str, Any] | None:
    """The handshake of the run of this name below the folder `runs` of a service; None: there is no such run.

    Raises:
        CheckpointError: if the file is damaged.
    """
    return _stored_handshake(folder / name) if _RUN_NAME.fullmatch(name) else None


def drop_run(folder: Path, name: str) -> None:
    """Delete a run of a service; a running server hears of it at the next call.

    Raises:
        ConfigError: if there is no such run.
    """
    names = [known for known, _ in stored_runs(folder)]
    if name not in names:
        raise ConfigError(f"no run is called {name}; there are {', '.join(names) or 'none'}")
    gone = folder / f".{name}.dropped"
    shutil.rmtree(gone, ignore_errors=True)  # left by a process that was killed
    (folder / name).rename(gone)
    shutil.rmtree(gone)


def _handshake_file(folder: Path) -> Path | None:
    names = ("handshake.json", "agreement.json")  # the second before version 0.2
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _stored_handshake(folder: Path) -> dict[str, Any] | None:
    """The model and training of a run's first Hello; None: there is no such run yet."""
    file = _handshake_file(folder)
    if file is None:
        return None
    try:
        stored: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        training = stored["training"]
        if "law" in training:  # the name of `distribution` before version 0.2
            training["distribution"] = training.pop("law")
        ParseDict(stored["model"], pb.Model())
        ParseDict(training, pb.Training())
        stored.setdefault("clients", [stored["first_client"]])
    except (OSError, msgspec.MsgspecError, ParseError, LookupError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"run {folder.name}: {file.name} on the server is damaged: {cause}; put it back, or choose another "
            "output_dir for a new run"
        ) from cause
    return stored


def each_run(sessions: Sessions, act: Callable[[ServedRun], Any]) -> None:
    """Call `act` with every run in memory."""
    for run in list(sessions.runs.values()):
        act(run)


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
    together = training.order == pb.SYNCHRONOUS or training.halves == pb.SHARED or training.clients < 2
    backprop = method.server == "first-order"
    if training.personal_server and (together or not backprop or training.trainable != pb.LORA):
        raise HandshakeError(
            "personal_server needs server.trainable: lora, a server that is trained by backprop, two clients or more, "
            "personal client halves and the sequential schedule"
        )
