"""The runs that this server holds and the sessions of their clients; a session begins with Hello."""

import re
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict

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
from hosl.service.hello.checks import check_numbers, check_protocol, check_same_halves, check_training
from hosl.service.hosted_half import HostedBank, HostedHalf, OpenHalf
from hosl.service.operation.heard import Heard
from hosl.service.operation.live_files import read_progress, write_progress
from hosl.service.operation.now import ClientNow, RunNow
from hosl.service.operation.quota import Quota
from hosl.service.operation.stored import (
    CLIENTS,
    RUN_NAME,
    checkpoints_below,
    handshake_file,
    handshake_in,
    saved_steps,
    stored_runs,
)
from hosl.service.runs import BASE, ServedRun
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import intact_steps, newest_checkpoint
from hosl.system.readable import readable_count
from hosl.wire import hosl_pb2 as pb

_MOST_RESTORABLE = 1024
UNTRAINED = pb.Training(
    method=pb.FROZEN, distribution=pb.GAUSSIAN, trainable=pb.ALL, optimiser=pb.Optimiser(name=pb.SGD), max_steps=1,
    lora=pb.Lora(r=8, alpha=16), clients=1, grace_s=5.0,
)  # fmt: skip
"""The settings of a half that is only used."""


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
            session is not None and session.run.name != BASE and handshake_file(session.run.home) is None
        )
        if session is not None and dropped:
            self._end_sessions(session.run)  # its memory is the compute thread's: `forget_dropped`
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
        self._heard.note(session.run.of, client)
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
        folder = run.home
        if run.name == BASE or handshake_file(folder) is None:
            if asked:
                raise SessionError(f"run {run.name} was dropped by the server's owner; say hello again")
            return run.server_step
        if asked and run.server_step not in run.saved_steps():
            with suppress(
                CheckpointError
            ):  # a handshake that is damaged names no client; what was trained is saved
                self._check_disk(run.of, (handshake_in(folder) or {}).get("first_client", ""))
        step = run.save(asked=asked)
        if handshake_file(folder) is None:  # dropped meanwhile
            shutil.rmtree(folder, ignore_errors=True)
        return step

    def dropped(self) -> list[ServedRun]:
        """The runs in memory that the owner has dropped, without those of which a text is under way."""
        return [
            run
            for run in list(self.runs.values())
            if run.name != BASE and not self._used[run.name] and handshake_file(run.home) is None
        ]

    def forget_dropped(self) -> None:
        """Let the memory go of runs that the owner has dropped. Runs in the compute thread, so between two Hellos."""
        for run in self.dropped():
            self._forget(run)

    def now(self) -> list[RunNow]:
        """The runs in memory, and when their clients were heard."""
        parts = dict[str, list[ServedRun]]()
        for run in list(self.runs.values()):
            if run.name != BASE:
                parts.setdefault(run.of, []).append(run)
        return [self._run_now(of_run) for of_run in parts.values()]

    def _run_now(self, parts: list[ServedRun]) -> RunNow:
        """A run by what is in memory of it: the run, or its clients' parts."""
        run, since = parts[0], time.time() - self._away_s
        ids = {id(part) for part in parts}
        here = {session.client for session in list(self._sessions.values()) if id(session.run) in ids}
        heard = self._heard.clients(run.of)

        def now(name: str, step: int, loss: float | None = None) -> ClientNow:
            present = name in here and heard.get(name, 0.0) > since
            return ClientNow(step, heard.get(name), present, loss)

        if run.client:
            clients = self._heard.elsewhere(run.of) | {
                part.client: now(part.client, part.server_step, part.last_loss) for part in parts
            }
            losses = [client for client in clients.values() if client.loss is not None]
            newest = max(losses, key=lambda client: client.heard or 0.0, default=None)
            step, loss = min(c.step for c in clients.values()), None if newest is None else newest.loss
        else:
            steps, step, loss = dict(run.steps), run.server_step, run.last_loss
            clients = {name: now(name, steps.get(name, 0)) for name in sorted({*here, *heard, *steps})}
        return RunNow(
            name=run.of, step=step, max_steps=run.training.max_steps, loss=loss,
            expected=max(run.training.clients, 1), clients=clients,
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
        check_protocol(request.protocol, personal=request.training.personal_server)
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
            if stored is None or (run.client and (gone or client not in stored["clients"])):
                self._forget(run)  # begun by this Hello, and nothing was trained in it
            if stored is None:
                shutil.rmtree(folder)
            elif gone and run.client:
                self._move(folder, client, gone)
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
            self._heard.left(run.of, gone)
        self._heard.note(run.of, client)
        for before in self._end_sessions(run, client):
            self._taken_over[run.name, client] = before
        return self._begun(Session(client, run)), start, run

    def _look(self, client: str, request: pb.HelloRequest) -> tuple[str, int, ServedRun]:
        """Begin a session that only reads, of a run of this client, or of the half as it was split."""
        ask = pb.AskGenerate(
            protocol=request.protocol, model=request.model, run=request.run, base=not request.run
        )
        run = self.for_use(client, ask)
        self._heard.note(run.of, client)
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
                if gone is None and not training.personal_server:  # whose adapters are nobody else's
                    gone = self._heard.vanished(request.run, roster)
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
        run = self.runs.get(_name_of(request.run, training, client))
        if run is not None and request.run in self._over_quota and stored is not None and not run.finished:
            self._check_disk(request.run, stored["first_client"])  # else it would train until its next Save
        if run is None:
            check_training(training)
            if not self._parts(request.run):
                self._make_room()
            if stored is None:
                self._count_runs(client)
                self._check_disk(request.run, client)
            if gone and training.personal_server:
                self._move(folder, gone, client)
            run = self._opened(request.run, model, training, client)
            if stored is not None and not run.finished:
                try:
                    self._check_disk(request.run, stored["first_client"])
                except LimitError:
                    if gone and run.client:
                        self._forget(run)
                        self._move(folder, client, gone)
                    raise
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
        name, folder = _name_of(of, training, client), checkpoints_below(self._folder / of, training, client)
        own = client if training.personal_server else ""
        stored = handshake_in(self._folder / of)
        try:
            half = self._half(of, model, training, client)
            run = ServedRun(name, model, training, half, folder, self._say, own)
            if stored is not None and (saved := next(intact_steps(run.folder, self._say), None)):
                run.go_back(saved)
                for old, new in stored.get("heirs", {}).items():  # since the checkpoint
                    run.hand_over(old, new)
        except BaseException:
            self._let_go_of_bank(of, own)
            raise
        progress = read_progress(run.home)
        if not self._parts(of):
            self._heard.opened(of, progress, stored["clients"] if own and stored else ())
        known = self._heard.elsewhere(of).get(own) if own else progress
        if known is not None and known.step == run.server_step:
            run.last_loss = known.loss
        self.runs[name] = run
        for part in self._parts(of):  # else all clients that ever came would stay in memory
            if part is not run and part.client and not self._used[part.name] and self._is_left(part):
                self._save_and_forget(part)
        return run

    def _save_and_forget(self, run: ServedRun) -> None:
        """Save a run, or a client's part of one, and let its memory go; what `hosl runs` shows of it stays."""
        self.save(run, asked=False)
        parts = self._parts(run.of)
        if run.name != BASE and len(parts) == 1:
            with suppress(OSError):  # a hint for `hosl runs`
                write_progress(run.home, self._run_now(parts))
        if run.client:
            self._heard.parted(run.of, run.client, run.server_step, run.last_loss)
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
        check_protocol(ask.protocol, personal=False)
        of = self._named(client, ask)
        stored = handshake_in(self._folder / of) or {}
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
        stored = handshake_in(self._folder / name) or {}
        training = ParseDict(stored.get("training", {}), pb.Training())
        checkpoints = checkpoints_below(self._folder / name, training, client)
        folder = newest_checkpoint(checkpoints) or self._folder / name
        silent_s = self._heard.silent_s(name, client if training.personal_server else "")
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
        return not self.clients_of(run) or self._heard.silent_s(run.of, run.client) > self._away_s

    def _forget(self, run: ServedRun) -> None:
        self.runs.pop(run.name, None)
        run.let_go = True
        if not self._parts(run.of):
            self._heard.closed(run.of)
        self._end_sessions(run)
        self._let_go_of_bank(run.of, run.client)

    def _let_go_of_bank(self, of: str, client: str) -> None:
        """Let go of a client's half, and of the base with the last one; the next is opened by the settings of then."""
        if (bank := self._banks.get(of)) is not None and client:
            bank.forget(client)
            if not self._parts(of):
                del self._banks[of]

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
        self._quota.check_count(client, len(begun))

    def _check_disk(self, name: str, first_client: str) -> None:
        self._over_quota.add(name)
        self._quota.check_disk(self._folder, name, first_client)
        self._over_quota.discard(name)


def _name_of(run: str, training: pb.Training, client: str) -> str:
    """The name in memory of a run, or of a client's part of it."""
    return f"{run}/{client}" if training.personal_server else run


def save_all(sessions: Sessions) -> None:
    """Save every run in memory, though no client asked for it.

    Raises:
        FailureError, OSError: of the first that could not be saved, once the others are.
    """
    failed: list[Exception] = []
    for run in list(sessions.runs.values()):
        try:
            sessions.save(run, asked=False)
        except (FailureError, OSError) as error:
            failed.append(error)
    if failed:
        raise failed[0]
