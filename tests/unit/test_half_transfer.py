"""A half that is given away: list, chunks, a broken transfer that goes on, and what is refused. Over loopback."""

import asyncio
import json
import threading
from hashlib import sha256

import grpc.aio
import numpy as np
import pytest
import safetensors.numpy

from hosl.errors import (
    AccessError,
    CheckpointError,
    FailureError,
    HandshakeError,
    LimitError,
    LinkError,
    WireError,
)
from hosl.network.half_transfer import fetch_half, give_half
from hosl.service.access import Access
from hosl.service.calls import Calls
from hosl.service.giving import Giving, given_of
from hosl.service.limits import Limits
from hosl.service.scheduler import Scheduler
from hosl.service.sessions import Sessions
from hosl.service.status import Status
from hosl.system.checkpoint import Checkpoint, checkpoint_path, write_checkpoint
from hosl.transport.channel import Channel, Patience, Proof
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from hosl.wire.half_files import ArrivingHalf, DepartingHalf, stored_tensors
from hosl.wire.halves import listing_of
from hosl.wire.tensors import CHUNK_BYTES

ROWS = CHUNK_BYTES // 4
BASE = {"kept": np.arange(2 * ROWS + 7, dtype=np.float32), "changed": np.zeros((3, 5), np.float32)}
TRAINED = {
    "changed": np.ones((3, 5), np.float32), "adapter": np.arange(ROWS + 1, dtype=np.float32)
}  # fmt: skip
GIVEN = pb.Given(run="run", weights=pb.Given.ALL, lora=pb.Lora(r=8, alpha=16), digest=bytes(32))


class Served:
    """A service on a thread's own loop, over loopback; it can be stopped in the middle and started again."""

    def __init__(self, folder):
        self.service, self.half, self.port, self.allowed = folder / "service", folder / "half", 0, True
        self.half.mkdir()
        safetensors.numpy.save_file(BASE, self.half / "model.safetensors")
        run = self.service / "runs" / "run"
        run.mkdir(parents=True)
        facts = {"model": {}, "training": {}, "first_client": "first", "clients": ["first"]}
        (run / "handshake.json").write_text(json.dumps(facts))
        safetensors.numpy.save_file(TRAINED, folder / "trained.safetensors")
        self.save(4)
        self.access = Access(self.service)
        self.tokens = {name: self.access.enrol(name) for name in ("first", "other")}
        self.start()

    def save(self, step):
        """Write a checkpoint of the server, and no other."""
        folder = self.service / "runs" / "run" / "checkpoints"
        checkpoint = Checkpoint(step=step)
        checkpoint.tensors["server/trained"] = {name: _torch(array + step) for name, array in TRAINED.items()}
        write_checkpoint(folder, checkpoint, beside=())

    def start(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self._in_loop(self._start())

    def stop(self):
        self._in_loop(self.server.stop(grace=0))
        self._in_loop(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.scheduler.close()

    async def _start(self):
        self.scheduler = Scheduler()
        giving = Giving(
            runs=self.service / "runs", half=self.half, allowed=self.allowed, most_bytes=lambda: 4 << 20
        )
        sessions = Sessions(self.service, lambda model, training: None)
        status = Status(log=lambda line: None)
        calls = Calls(self.access, sessions, self.scheduler, status, Limits(), idle_s=5.0, giving=giving)
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((calls.handler(),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    def _in_loop(self, work):
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def channel(self, client="first"):
        line = JoinLine("127.0.0.1", self.port, self.tokens[client], None)
        return Counting(line, patience=Patience(longest_pause_s=0.2), proof=Proof(plaintext=True))


class Counting(Channel):
    """A channel that counts the chunks that pass, and calls `broken` once, after `after` of them."""

    def __init__(self, *args, **kwargs):
        self.chunks, self.bytes, self.largest, self.after, self.broken = 0, 0, 0, 0, None
        super().__init__(*args, **kwargs)

    def converse(self, name, frames, reply_type):
        up = (self._counted(frame) for frame in frames)
        for reply in super().converse(name, up, reply_type):
            yield self._counted(reply)

    def _counted(self, message):
        if "part" in message.DESCRIPTOR.oneofs_by_name and message.WhichOneof("part") == "chunk":
            self.chunks += 1
            self.bytes += len(message.chunk)
            self.largest = max(self.largest, len(message.chunk))
            if self.broken and self.chunks > self.after:
                breaks, self.broken = self.broken, None
                breaks()
        return message


def _torch(array):
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))


def _dies():
    raise KeyboardInterrupt


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    yield made
    made.stop()


def _fetched(channel, folder, step=0, check=lambda listing: None, said=None):
    said = [] if said is None else said
    listing, file = fetch_half(channel, "run", step, folder, check, said.append)
    return listing, file.read_bytes()


def _expected():
    """The tensors that a client must get."""
    return {"base/kept": BASE["kept"], **{f"trained/{name}": array + 4 for name, array in TRAINED.items()}}


def test_a_half_arrives_with_what_was_trained_in_place_of_the_base(served, tmp_path):
    channel = served.channel()
    listing, _ = _fetched(channel, tmp_path / "fetched")
    assert channel.largest == CHUNK_BYTES
    found = safetensors.numpy.load_file(tmp_path / "fetched" / "half.safetensors")
    assert found.keys() == _expected().keys()
    assert all(np.array_equal(found[name], array) for name, array in _expected().items())
    assert [t.sha256 for t in listing.tensors] == [
        sha256(found[t.name].tobytes()).digest() for t in listing.tensors
    ]


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("side", ["the device", "the server"])
def test_a_fetch_that_broke_off_goes_on_where_it_was(served, tmp_path, after, side):
    listing, whole = _fetched(served.channel(), tmp_path / "whole")
    channel, said = served.channel(), []

    def restart():
        served.stop()
        served.start()
        raise LinkError("the server is gone")

    channel.after, channel.broken = after, _dies if side == "the device" else restart
    if side == "the device":
        with pytest.raises(KeyboardInterrupt):
            _fetched(channel, tmp_path / "broken")
        before, channel = channel.bytes, served.channel()
    else:
        before = 0
    assert _fetched(channel, tmp_path / "broken", said=said)[1] == whole
    lost = CHUNK_BYTES  # the chunk that was under way
    assert listing.size_bytes <= before + channel.bytes <= listing.size_bytes + lost
    assert any("of it are here already" in line for line in said) == (after > 0)


def test_what_a_disk_damaged_of_a_fetch_is_fetched_again(served, tmp_path):
    listing, whole = _fetched(served.channel(), tmp_path / "fetched")
    file = tmp_path / "fetched" / "half.safetensors"
    content = bytearray(whole)
    content[-5] ^= 1  # in the last tensor
    file.write_bytes(content)
    channel = served.channel()
    assert _fetched(channel, tmp_path / "fetched")[1] == whole
    assert channel.bytes == listing.tensors[-1].size_bytes
    again = served.channel()
    assert _fetched(again, tmp_path / "fetched")[1] == whole
    assert again.bytes == 0


def test_a_half_that_became_another_one_in_between_is_fetched_anew(served, tmp_path):
    channel = served.channel()
    channel.after, channel.broken = 2, _dies
    with pytest.raises(KeyboardInterrupt):
        _fetched(channel, tmp_path / "fetched")
    served.save(8)
    listing, _ = _fetched(served.channel(), tmp_path / "fetched")
    assert listing.step == 8
    found = safetensors.numpy.load_file(tmp_path / "fetched" / "half.safetensors")
    assert np.array_equal(found["trained/adapter"], TRAINED["adapter"] + 8)
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4 on the server; there are \[8\]"):
        _fetched(served.channel(), tmp_path / "old", step=4)


def test_only_a_client_of_the_run_gets_a_half_and_only_where_it_is_allowed(served, tmp_path):
    with pytest.raises(HandshakeError, match="client other took part in no run 'run' of this server"):
        _fetched(served.channel("other"), tmp_path / "fetched")
    with pytest.raises(HandshakeError, match="took part in no run"):
        fetch_half(served.channel(), "../run", 0, tmp_path / "fetched", lambda _: None, lambda _: None)
    served.access.revoke("first")
    with pytest.raises(AccessError, match="revoked"):
        _fetched(served.channel(), tmp_path / "fetched")
    served.stop()
    served.allowed = False
    served.start()
    served.tokens["second"] = served.access.enrol("second")
    with pytest.raises(AccessError, match="this server keeps its half; its owner starts it with --give-half"):
        _fetched(served.channel("second"), tmp_path / "fetched")
    assert not (tmp_path / "fetched").exists()


def test_a_damaged_checkpoint_is_not_given(served, tmp_path):
    folder = checkpoint_path(served.service / "runs" / "run" / "checkpoints", 4)
    file = folder / "server" / "trained.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="another content"):
        _fetched(served.channel(), tmp_path / "fetched")


def _own_half(tmp_path, **tensors):
    file = tmp_path / "own.safetensors"
    safetensors.numpy.save_file(tensors or {"w": np.arange(2 * ROWS + 1, dtype=np.float32)}, file)
    return list(stored_tensors(file, "trained").values())


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_half_that_broke_off_on_its_way_up_goes_on_where_it_was(served, tmp_path, after):
    tensors, channel = _own_half(tmp_path), served.channel()
    channel.after = after

    channel.broken = lambda: (served.stop(), served.start())  # the call is broken off in its sending thread
    size = give_half(channel, GIVEN, 4, tensors, lambda text: None)
    ((given, step, file),) = given_of(served.service / "runs", "run").values()
    assert (given, step, size) == (GIVEN, 4, 8 * ROWS + 4)
    assert np.array_equal(
        safetensors.numpy.load_file(file)["trained/w"], np.arange(2 * ROWS + 1, dtype=np.float32)
    )


def test_a_half_that_is_given_again_replaces_the_former_one(served, tmp_path):
    for value in (1, 2):
        give_half(served.channel(), GIVEN, value, _own_half(tmp_path, w=np.full(3, value)), lambda _: None)
        ((_, step, file),) = given_of(served.service / "runs", "run").values()
        assert (step, safetensors.numpy.load_file(file)["trained/w"].tolist()) == (value, [value] * 3)


def test_what_is_too_large_or_no_half_is_refused_before_a_byte_of_it_is_kept(served, tmp_path):
    large = _own_half(tmp_path, w=np.zeros((2 << 20) + 1, np.float16))
    with pytest.raises(LimitError, match=f"more than {4 << 20:,} bytes"):
        give_half(served.channel(), GIVEN, 4, large, lambda text: None)
    with pytest.raises(HandshakeError, match="took part in no run"):
        give_half(served.channel("other"), GIVEN, 4, _own_half(tmp_path), lambda text: None)
    with pytest.raises(WireError, match="a digest of 32 bytes"):
        give_half(served.channel(), pb.Given(run="run", weights=1), 4, _own_half(tmp_path), lambda _: None)
    assert not (served.service / "runs" / "run" / "given").exists()


DTYPE_LIES = {
    "another name": {"name": "trained/../x"}, "no place": {"name": "x"}, "a dtype of its own": {"dtype": "F128"},
    "no size": {"shape": [0]}, "a size beyond all": {"shape": [1 << 62]},
    "sizes that multiply": {"shape": [1 << 30] * 8}, "a short digest": {"sha256": b"x"},
    "a journal of floats": {"name": "journal"},
}  # fmt: skip


@pytest.mark.parametrize("lie", DTYPE_LIES.values(), ids=DTYPE_LIES)
def test_a_list_is_checked_before_anything_is_allocated_for_it(lie):
    honest = {"name": "trained/x", "dtype": "F32", "shape": [3], "sha256": bytes(32)}
    assert listing_of([pb.HalfList(tensors=[pb.HalfTensor(**honest)])]).size_bytes == 12
    with pytest.raises((WireError, LimitError)):
        listing_of([pb.HalfList(tensors=[pb.HalfTensor(**honest | lie)])])


def test_a_list_names_each_tensor_once_and_has_an_end():
    tensor = pb.HalfTensor(name="trained/x", dtype="F32", shape=[3], sha256=bytes(32))
    with pytest.raises(WireError, match="names trained/x twice"):
        listing_of([pb.HalfList(tensors=[tensor, tensor])])
    for endless in ([pb.HalfList(tensors=[tensor], more=True)], [pb.HalfList(more=True)] * 3):
        with pytest.raises(WireError, match="has no end"):
            listing_of(endless)


def test_a_long_list_is_sent_in_messages_that_fit(tmp_path):
    safetensors.numpy.save_file(
        {f"{'w' * 200}{i}": np.zeros(1, np.float32) for i in range(2500)}, tmp_path / "many"
    )
    departing = DepartingHalf(3, list(stored_tensors(tmp_path / "many", "base").values()))
    parts = list(departing.listing.messages())
    assert len(parts) > 1
    assert max(part.ByteSize() for part in parts) < CHUNK_BYTES
    assert listing_of(parts) == departing.listing
    departing.close()


def test_bytes_with_another_digest_or_too_many_are_refused_and_the_rest_stays(tmp_path):
    departing = DepartingHalf(4, _own_half(tmp_path, a=np.ones(4), b=np.ones(5)))
    first, second = departing.chunks()
    with ArrivingHalf(tmp_path / "in", departing.listing) as arriving:
        arriving.add(first)
        with pytest.raises(WireError, match="trained/b of a half arrived with another digest"):
            arriving.add(bytes(len(second)))
        assert arriving.have == len(first)
        arriving.add(second)
        with pytest.raises(WireError, match="more bytes of a half arrived than its list says"):
            arriving.add(b"x")
        arriving.finish()
    departing.close()
    assert safetensors.numpy.load_file(tmp_path / "in" / "half.safetensors").keys() == {
        "trained/a",
        "trained/b",
    }


def test_a_disk_without_room_is_told_before_the_first_byte(tmp_path, monkeypatch):
    departing = DepartingHalf(4, _own_half(tmp_path))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(FailureError, match="the disk has room for 1,000; free some"):
        ArrivingHalf(tmp_path / "in", departing.listing)
    departing.close()
