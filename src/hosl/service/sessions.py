"""The runs that this server holds and the sessions of their clients; a session begins with Hello."""

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from hosl.core.methods import METHODS
from hosl.errors import CheckpointError, HandshakeError, LimitError, SessionError, WireError
from hosl.service.hosted_half import OpenHalf
from hosl.service.runs import ServedRun
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import intact_steps
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum

PROTOCOL = 1
_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MOST_RESTORABLE = 1024
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


class Sessions:
    """The runs in memory and on disk, and the sessions since this process started."""

    def __init__(
        self,
        folder: Path,
        open_half: OpenHalf,
        say: Callable[[str], None] = lambda text: None,
        runs_at_once: int = 1,
    ) -> None:
        self._folder, self._say = folder / "runs", say
        self._open_half, self._runs_at_once = open_half, runs_at_once
        self._incarnation = secrets.token_hex(8)  # so that no session of an earlier process is valid
        self._count = 0
        self.runs: dict[str, ServedRun] = {}
        self._sessions: dict[str, Session] = {}

    def of(self, client: str, where: pb.Where) -> Session:
        """The session that a request names.

        Raises:
            SessionError: if there is no such session, or it is another client's.
        """
        session = self._sessions.get(where.session)
        if session is None or session.client != client:
            raise SessionError("this session is not known here (any more); say hello again")
        return session

    def clients_of(self, run: ServedRun) -> list[str]:
        """The names of the clients that have a session in a run, sorted."""
        return sorted({session.client for session in self._sessions.values() if session.run is run})

    def hello(self, client: str, request: pb.HelloRequest) -> tuple[str, int, ServedRun]:
        """Find or open the run and settle on a state; returns the session, the step to go on from, and the run.

        Runs in the compute thread: it may load and move weights.

        Raises:
            WireError: if the request is malformed. HandshakeError: if the two sides do not fit.
            LimitError: if this server is busy with other runs.
        """
        if request.protocol != PROTOCOL:
            raise HandshakeError(
                f"this server speaks protocol {PROTOCOL}, the client {request.protocol}; install the same version of "
                "hosl on both sides"
            )
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
        run = self._find_or_open(client, request)
        run.agree(request.model, request.training)
        if client not in run.steps and len(run.steps) >= max(run.training.clients, 1):
            raise HandshakeError(
                f"run {run.name} is for {max(run.training.clients, 1)} clients and has {', '.join(sorted(run.steps))}; "
                "set clients.count higher for all, or choose another output_dir"
            )
        start = run.settle(client, request.restorable, request.current)
        for name in [n for n, s in self._sessions.items() if s.client == client and s.run is run]:
            del self._sessions[name]
        self._count += 1
        session = f"{self._incarnation}.{self._count}"
        self._sessions[session] = Session(client, run)
        return session, start, run

    def _find_or_open(self, client: str, request: pb.HelloRequest) -> ServedRun:
        if request.run in self.runs:
            return self.runs[request.run]
        self._make_room()
        folder = self._folder / request.run
        handshake, stored = folder / "handshake.json", _stored_handshake(folder)
        model, training = stored or (request.model, request.training)
        check_training(training)
        half = self._open_half(model, training)
        run = ServedRun(request.run, model, training, half, folder / "checkpoints", self._say)
        if stored is None:
            folder.mkdir(parents=True, exist_ok=True)
            facts: dict[str, Any] = {
                "model": MessageToDict(model), "training": MessageToDict(training), "first_client": client,
            }  # fmt: skip
            whole_file(handshake, msgspec.json.format(msgspec.json.encode(facts), indent=1))
        elif saved := next(intact_steps(run.folder, self._say), None):
            run.go_back(saved)
        self.runs[request.run] = run
        return run

    def _make_room(self) -> None:
        """Save and drop finished runs until one more fits in memory."""
        while len(self.runs) >= self._runs_at_once:
            finished = next((run for run in self.runs.values() if run.finished), None)
            if finished is None:
                busy = ", ".join(
                    f"{run.name} ({', '.join(self.clients_of(run))})" for run in self.runs.values()
                )
                raise LimitError(
                    f"this server trains {len(self.runs)} runs at once and is busy with {busy}; wait until one is "
                    "finished, or ask its owner for `hosl serve --runs-at-once`"
                )
            finished.save(asked=False)
            del self.runs[finished.name]
            for name in [n for n, s in self._sessions.items() if s.run is finished]:
                del self._sessions[name]


def _stored_handshake(folder: Path) -> tuple[pb.Model, pb.Training] | None:
    """The model and training of a run's first Hello; None: there is no such run yet.

    Raises:
        CheckpointError: if the file is damaged.
    """
    former = folder / "agreement.json"  # its name, and that of `distribution` in it, before version 0.2
    file = next((file for file in (folder / "handshake.json", former) if file.is_file()), None)
    if file is None:
        return None
    try:
        stored: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        training = stored["training"]
        if "law" in training:
            training["distribution"] = training.pop("law")
        return ParseDict(stored["model"], pb.Model()), ParseDict(training, pb.Training())
    except (OSError, msgspec.MsgspecError, ParseError, LookupError, TypeError, AttributeError) as cause:
        raise CheckpointError(
            f"run {folder.name}: {file.name} on the server is damaged: {cause}; put it back, or choose another "
            "output_dir for a new run"
        ) from cause


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
