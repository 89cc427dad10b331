"""The two ways of a half that is given away, seen from the device: the server's down, the device's own up. No torch.

Both go on at the byte where they broke off, and are tried again while the link fails.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from hosl.config import Config
from hosl.errors import FolderError, LinkError, StepError, WireError
from hosl.parties.remote.server import reply_part
from hosl.system.checkpoint import checkpoint_path, intact_steps, journal_bytes
from hosl.system.readable import readable_bytes
from hosl.transport.channel import Channel
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import to_enum
from hosl.wire.half_files import (
    ArrivingHalf,
    DepartingHalf,
    StoredTensor,
    stored_journal,
    stored_tensors,
)
from hosl.wire.halves import HalfListing, listing_of

_TRIES = 10
"""The times in a row that the server's half may become another one while it is fetched."""


def fetch_half(
    channel: Channel,
    run: str,
    step: int,
    folder: Path,
    check: Callable[[HalfListing], None],
    say: Callable[[str], None],
) -> tuple[HalfListing, Path]:
    """Fetch the server's half of a run into a folder, or the rest of it; returns its list and its file.

    Args:
        channel: to the server.
        run: the run's name there.
        step: the step of the half; 0: the newest.
        folder: what it has of the same half is kept.
        check: is called with the list before anything is fetched; raises where it is of another half.
        say: is called with lines of text.

    Raises:
        AccessError: if the server keeps its half. HandshakeError: if this client took no part in the run.
        CheckpointError: if the server has no such step. WireError: if a tensor arrives with another digest.
    """

    def once() -> tuple[HalfListing, Path]:
        listing = listing_of(_lists(channel, pb.HalfRequest(run=run, step=step)))
        check(listing)
        with ArrivingHalf(folder, listing) as arriving:
            if not arriving.complete:
                here = f", {readable_bytes(arriving.have)} of it are here already" if arriving.have else ""
                size = readable_bytes(listing.size_bytes)
                say(f"fetching the server's half of step {listing.step}, {size}{here}")
                _fill(channel, run, arriving)
            return listing, arriving.finish()

    for _ in range(_TRIES):
        try:
            return channel.for_ever(once, say)
        except StepError as moved:
            say(f"{moved}")
    raise FolderError(f"run {run} goes on while its half is fetched; ask again when it is finished")


def give_half(
    channel: Channel, given: pb.Given, step: int, tensors: list[StoredTensor], say: Callable[[str], None]
) -> int:
    """Send this device's half to the server, or what it lacks of it; returns the bytes of the whole.

    Raises:
        HandshakeError: if this client took no part in the run. LimitError: if the half is too large for the server.
    """
    departing = DepartingHalf(step, tensors)
    size = departing.listing.size_bytes

    def once() -> int:
        known: SimpleQueue[int | None] = SimpleQueue()

        def frames() -> Iterator[pb.GiveRequest]:
            yield pb.GiveRequest(given=given)
            yield from (pb.GiveRequest(list=part) for part in departing.listing.messages())
            have = known.get()
            if have is not None:
                yield from (pb.GiveRequest(chunk=chunk) for chunk in departing.chunks(have))

        replies = channel.converse("Give", frames(), pb.GiveReply)
        try:
            first = next(replies, pb.GiveReply())
            if first.have > size:
                raise WireError(f"the server says that it has {first.have} bytes of a half of {size}")
            known.put(first.have)
            if not next(replies, first).complete:
                raise LinkError("the server went away before it had the whole half")
            return size
        finally:
            known.put(None)  # in any case: the sending thread must end

    try:
        return channel.for_ever(once, say)
    finally:
        departing.close()


def given_message(
    config: Config, run: str, record: dict[str, Any], checkpoint: Path
) -> tuple[pb.Given, list[StoredTensor]]:
    """What a device says of the half that it gives, and the tensors: of a checkpoint that is as it was written.

    Shared halves are rebuilt from the server's own journal, so no tensor is sent.
    """
    lora, trainable = config.client.lora, config.client.trainable
    of_last_blocks = trainable == "output-projections" or (
        trainable == "lora" and config.method_row.needs_blocks
    )
    given = pb.Given(
        run=run, weights=to_enum(pb.Given.Weights, trainable),
        lora=pb.Lora(r=lora.r, alpha=lora.alpha, target_modules=lora.target_modules or ()),
        low_precision=config.client.dtype != "model", digest=bytes.fromhex(record["client_digest"]),
        updates=record.get("journal_updates", 0),
        blocks=config.trained_blocks if of_last_blocks else 0,
    )  # fmt: skip
    if config.clients.halves == "shared":
        return given, []
    journal, tensors = checkpoint / "client" / "journal.bin", list[StoredTensor]()
    for name, place in (("trained", "trained"), ("head", "head")):
        file = checkpoint / "client" / f"{name}.safetensors"
        if file.is_file() and not (name == "trained" and journal.is_file()):
            tensors += stored_tensors(file, place).values()
    if (
        not lora.target_modules
    ):  # the server's own choice may be another one, as where a method adapts its own layers
        adapted = {t.name.partition(".lora_")[0].rpartition(".")[2] for t in tensors if ".lora_" in t.name}
        given.lora.target_modules.extend(sorted(adapted))
    return given, [*tensors, *stored_journal(journal, journal_bytes(checkpoint))]


def give_finished(config: Config, run: Path, record: dict[str, Any], channel: Channel, say: Any) -> None:
    """Give the half of a finished run of `hosl join` to its server, because its person wants it.

    Raises:
        FolderError: if it is not finished. CheckpointError: if no checkpoint of the run is intact.
        HandshakeError, LimitError: see `give_half`.
    """
    steps = intact_steps(run / "checkpoints", say)
    step = next(steps, None)
    if step is None:
        raise FolderError(f"{run} has no checkpoint, so its half cannot be given; put {run}/checkpoints back")
    if "client_digest" not in record:
        raise FolderError(
            f"{run} is not finished, or lost its record.json; the same `hosl join` command ends it"
        )
    given, tensors = given_message(
        config, record["run_id"], record, checkpoint_path(run / "checkpoints", step)
    )
    size = give_half(channel, given, step, tensors, say)
    kind = "its journal is the server's" if config.clients.halves == "shared" else readable_bytes(size)
    say(f"the server has this device's half of run {record['run_id']} now ({kind})")


def _lists(channel: Channel, request: pb.HalfRequest) -> Iterator[pb.HalfList]:
    replies = channel.converse("Half", [request], pb.HalfReply)
    while True:
        part = reply_part("Half", replies, "list")
        yield part
        if not part.more:
            return


def _fill(channel: Channel, run: str, arriving: ArrivingHalf) -> None:
    """Append the bytes that are lacking."""
    listing = arriving.listing
    request = pb.HalfRequest(run=run, step=listing.step, list_digest=listing.digest, offset=arriving.have)
    replies = channel.converse("Half", [request], pb.HalfReply)
    while not arriving.complete:
        arriving.add(reply_part("Half", replies, "chunk"))
