"""Halves that are given away: the server's to a client of the run, a client's to the server. Only where it is allowed.

    RUNS/NAME/given/CLIENT/given.json         what a client said of its half; written when all of it is here
    RUNS/NAME/given/CLIENT/half.safetensors   its journal, or the weights that it trained (and its head)

Bytes go from disk to disk, outside of any session and of the compute thread: no run that trains meanwhile is held up.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from hosl.errors import (
    AccessError,
    BusyError,
    CheckpointError,
    FailureError,
    HandshakeError,
    HoslError,
    StepError,
    WireError,
)
from hosl.service.incoming import Incoming
from hosl.service.operation.stored import checkpoints_below, stored_handshake
from hosl.system.atomic import whole_file
from hosl.system.checkpoint import checkpoint_path, checkpoint_steps, intact_steps, journal_bytes
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum
from hosl.wire.half_files import (
    ArrivingHalf,
    DepartingHalf,
    StoredTensor,
    stored_journal,
    stored_tensors,
)
from hosl.wire.halves import HalfListing, listing_of

_LISTINGS = 16
"""The lists that are kept: each costs a pass over the half's files."""
GIVEN = "given.json"


@dataclass(kw_only=True)
class Giving:
    """The calls Half and Give over the folders of a service. For one event loop."""

    runs: Path
    """The folder of the service's runs."""
    half: Path
    """The folder of the server half at its base weights."""
    allowed: bool
    """Whether the owner lets clients of a run have the server's half."""
    most_bytes: Callable[[], int]
    """The largest half of a client that is taken."""
    say: Callable[[str], None] = lambda text: None
    """Is called with a line about each damaged checkpoint."""
    _listings: dict[tuple[Path, int, str], HalfListing] = field(default_factory=dict)
    """By folder of checkpoints, step and the digest of the checkpoint's state.json."""
    _arriving: set[Path] = field(default_factory=set)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def down(self, client: str, incoming: Incoming) -> AsyncGenerator[pb.HalfReply, None]:
        """The list of the server's half, or its bytes.

        Raises:
            AccessError: if the owner keeps the half. HandshakeError: if the client took no part in such a run.
            StepError: if it is not the half of the list that was asked for. CheckpointError: if there is no such step.
        """
        request = await incoming.message(pb.HalfRequest)
        await incoming.end()
        if not self.allowed:
            raise AccessError("this server keeps its half; its owner starts it with --give-half")
        folder = self._checkpoints_of(client, request.run)
        async with self._lock:  # one pass over the files at a time
            departing = await asyncio.to_thread(self._departing, request.run, folder, request.step)
        try:
            listing = departing.listing
            if not request.list_digest:
                for part in listing.messages():
                    yield pb.HalfReply(list=part)
                return
            if request.list_digest != listing.digest:
                raise StepError(f"the half of run {request.run} is another one by now: ask for its list anew")
            if request.offset > listing.size_bytes:
                raise WireError(
                    f"the half has {listing.size_bytes} bytes, asked was from {request.offset} on"
                )
            chunks = departing.chunks(request.offset)
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield pb.HalfReply(chunk=chunk)
        finally:
            departing.close()

    async def up(self, client: str, incoming: Incoming) -> AsyncGenerator[pb.GiveReply, None]:
        """Take a client's half, from the byte on to which it came the last time.

        Raises:
            HandshakeError: if the client took no part in such a run.
            WireError, LimitError: if what comes cannot be a half of this model.
            BusyError: if another call of the client sends the same.
        """
        given = (await incoming.message(pb.GiveRequest)).given
        self._checkpoints_of(client, given.run)
        _check_given(given)
        parts = [(await incoming.message(pb.GiveRequest)).list]
        while parts[-1].more and parts[-1].tensors:
            parts.append((await incoming.message(pb.GiveRequest)).list)
        most = await asyncio.to_thread(self.most_bytes)
        listing = listing_of(parts, most_bytes=most)
        folder = self.runs / given.run / "given" / client
        if folder in self._arriving:
            raise BusyError(
                f"client {client} gives the half of run {given.run} in another call; wait a moment"
            )
        self._arriving.add(folder)
        try:
            (folder / GIVEN).unlink(missing_ok=True)
            with await asyncio.to_thread(ArrivingHalf, folder, listing) as arriving:
                yield pb.GiveReply(have=arriving.have)
                while not arriving.complete:
                    message = await incoming.message(pb.GiveRequest)
                    await asyncio.to_thread(arriving.add, message.chunk)
                await incoming.end()
                await asyncio.to_thread(arriving.finish)
            facts = {"given": MessageToDict(given), "step": listing.step}
            whole_file(folder / GIVEN, msgspec.json.encode(facts))
            yield pb.GiveReply(have=listing.size_bytes, complete=True)
        except OSError as cause:  # a full disk; or the run was dropped meanwhile
            raise FailureError(f"the server cannot keep the half: {cause.strerror}; ask its owner") from cause
        finally:
            self._arriving.discard(folder)

    def _checkpoints_of(self, client: str, run: str) -> Path:
        """The folder of the checkpoints of the half that a client trained in a run; refuses who took no part."""
        stored = stored_handshake(self.runs, run)
        if stored is None or client not in stored["clients"]:
            raise HandshakeError(
                f"client {client} took part in no run {run[:64]!r} of this server; `hosl runs ls` there shows who did"
            )
        return checkpoints_below(self.runs / run, ParseDict(stored["training"], pb.Training()), client)

    def _departing(self, run: str, folder: Path, step: int) -> DepartingHalf:
        """The files of the server's half after a step, 0: of the newest checkpoint. Each is checked once."""
        known = next((key for key in self._listings if key[:2] == (folder, step)), None)
        if known is None or known[2] != _state_digest(folder, step):
            found = next((at for at in intact_steps(folder, self.say) if step in (0, at)), None)
            if found is None:
                raise CheckpointError(
                    f"run {run} has no checkpoint of step {step} on the server; there are "
                    f"{checkpoint_steps(folder) or 'none'}: let the run save, then ask again"
                )
            step, known = found, None
        tensors = half_tensors(self.half, checkpoint_path(folder, step))
        departing = DepartingHalf(step, tensors, self._listings.get(known) if known else None)
        while len(self._listings) >= _LISTINGS:
            self._listings.pop(next(iter(self._listings)))
        self._listings[folder, step, _state_digest(folder, step)] = departing.listing
        return departing


def half_tensors(half: Path, checkpoint: Path) -> list[StoredTensor]:
    """The tensors of a server half in its folder, those that were trained in a checkpoint, and a shared journal."""
    trained = stored_tensors(checkpoint / "server" / "trained.safetensors", "trained")
    base = stored_tensors(half / "model.safetensors", "base")
    journal = checkpoint / "client" / "journal.bin"
    kept = [tensor for name, tensor in base.items() if name not in trained]
    return [*kept, *trained.values(), *stored_journal(journal, journal_bytes(checkpoint))]


def given_of(runs: Path, run: str) -> dict[str, tuple[pb.Given, int, Path]]:
    """The clients that gave their half of a run: what each said, the step, and the file of the half.

    Raises:
        CheckpointError: if given.json is damaged.
    """
    found = {}
    for file in sorted((runs / run / "given").glob(f"*/{GIVEN}")):
        try:
            facts: dict[str, Any] = msgspec.json.decode(file.read_bytes())
            given = ParseDict(facts["given"], pb.Given())
            found[file.parent.name] = (given, int(facts["step"]), file.parent / "half.safetensors")
        except (OSError, msgspec.MsgspecError, ParseError, LookupError, TypeError, ValueError) as cause:
            raise CheckpointError(
                f"{file} is damaged: {cause}; the device gives its half again by `hosl join --give-half`"
            ) from cause
    return found


def _state_digest(folder: Path, step: int) -> str:
    try:
        return sha256((checkpoint_path(folder, step) / "state.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def _check_given(given: pb.Given) -> None:
    try:
        from_enum(pb.Given.Weights, given.weights)
    except HoslError as cause:
        raise WireError(f"weights of a given half: {cause}") from cause
    names = given.lora.target_modules
    lora_fits = 1 <= given.lora.r <= 1024 and 1 <= given.lora.alpha <= 2**20 and len(names) <= 64
    if len(given.digest) != 32 or not lora_fits or any(len(name) > 64 for name in names):
        raise WireError("a given half comes with a digest of 32 bytes, and with adapters of r 1..1024")
