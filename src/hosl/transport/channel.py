"""One connection to a server: pinned TLS, the token on every call, errors as hosl's own, and when to try again.

Timeouts are three in all (`Patience`). What the calls say: `hosl.wire`; what they mean: `hosl.parties.remote.server`.
"""

import ipaddress
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc

from hosl.errors import AccessError, ConfigError, LinkError
from hosl.transport.join_line import JoinLine, pinned_certificate
from hosl.transport.status import error_of
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import CHUNK_BYTES

SERVICE = "hosl.v1.Server"
MESSAGE_BYTES = CHUNK_BYTES + (1 << 16)
"""The largest message either side accepts: a chunk, or a question with its targets."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long things may take. Work itself has no limit: a slow server that answers pings is waited for."""

    connect_s: float = 10.0
    """For the first connection; later ones are tried for ever."""
    idle_s: float = 60.0
    """Without any sign of life from the other side."""
    longest_pause_s: float = 30.0
    """Between two tries; pauses double from 0.2 s, each shortened by chance by up to a half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """How the two sides prove themselves beyond token and fingerprint."""

    authority: Path | None = None
    """A PEM file of the authority that signed the server's certificate; for lines without a fingerprint."""
    identity: tuple[Path, Path] | None = None
    """PEM files of our own certificate and key, for a server that wants one (mTLS)."""
    plaintext: bool = False
    """No TLS at all; only to a loopback address."""


class Channel:
    """Calls to one server. Not for several threads at once, but for one caller and one sender."""

    def __init__(
        self, line: JoinLine, *, patience: Patience | None = None, proof: Proof | None = None
    ) -> None:
        """Connect for the first time.

        Raises:
            AccessError: if the certificate is not the one of the join line.
            ConfigError: if plaintext is asked for beyond loopback.
            LinkError: if nobody answers.
        """
        self.line, self.patience = line, patience or Patience()
        self._proof = proof or Proof()
        self.bytes_up = self.bytes_down = 0
        self._open()

    def close(self) -> None:
        """Let go of the connection."""
        self._channel.close()

    def ask(self, name: str, question: Any, answer: type[_Answer]) -> _Answer:
        """One message there, one back."""
        stub = self._channel.unary_unary(
            f"/{SERVICE}/{name}", request_serializer=self._sent, response_deserializer=self._received(answer)
        )
        return self._answered(lambda: stub(question, metadata=self._metadata))

    def upload(self, name: str, frames: Iterable[pb.Upload], answer: type[_Answer]) -> _Answer:
        """Many messages there, one back."""
        stub = self._channel.stream_unary(
            f"/{SERVICE}/{name}", request_serializer=self._sent, response_deserializer=self._received(answer)
        )
        return self._answered(lambda: stub(iter(frames), metadata=self._metadata))

    def converse(self, name: str, frames: Iterable[Any], answer: type[_Answer]) -> Iterator[_Answer]:
        """Many messages either way; ends the call when the caller stops reading."""
        stub = self._channel.stream_stream(
            f"/{SERVICE}/{name}", request_serializer=self._sent, response_deserializer=self._received(answer)
        )
        call = stub(iter(frames), metadata=self._metadata)
        try:
            while (part := self._answered(lambda: next(call, None))) is not None:
                yield part
        finally:
            call.cancel()

    def for_ever(self, work: Callable[[], _Answer], say: Callable[[str], None]) -> _Answer:
        """Do `work`, again and again while the link fails, with growing, jittered pauses; `say` hears of it."""
        pause_s, chance = 0.2, secrets.SystemRandom()
        while True:
            try:
                return work()
            except LinkError as lost:
                wait_s = pause_s * (1 - chance.random() / 2)
                if pause_s > 1:
                    say(f"{lost}; trying again in {wait_s:.1f} s")
                time.sleep(wait_s)
                pause_s = min(pause_s * 2, self.patience.longest_pause_s)

    def _open(self) -> None:
        options = [
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.keepalive_time_ms", int(self.patience.idle_s * 500)),
            ("grpc.keepalive_timeout_ms", int(self.patience.idle_s * 500)),
            ("grpc.http2.max_pings_without_data", 0),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", int(self.patience.longest_pause_s * 1000)),
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if self._proof.plaintext:
            _check_loopback(self.line.host)
            self._channel = grpc.insecure_channel(self.line.address, options)
        else:
            credentials, more = self._credentials()
            self._channel = grpc.secure_channel(self.line.address, credentials, options + more)
        self._metadata = (("authorization", f"Bearer {self.line.token}"),)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=self.patience.connect_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            raise LinkError(
                f"no hosl server answers at {self.line.address} within {self.patience.connect_s:g} s; check the "
                "address, that `hosl serve` runs there, and which certificates either side wants"
            ) from None

    def _credentials(self) -> tuple[Any, list[tuple[str, Any]]]:
        identity, key, certificate = self._proof.identity, None, None
        if identity:
            certificate, key = (_content(path) for path in identity)
        if self.line.fingerprint:
            files = (str(identity[0]), str(identity[1])) if identity else None
            root = pinned_certificate(self.line, timeout_s=self.patience.connect_s, identity=files)
            more = [("grpc.ssl_target_name_override", "hosl")]  # pinned: the name in it says nothing more
        else:
            root = _content(self._proof.authority) if self._proof.authority else None
            more = []
        return grpc.ssl_channel_credentials(root, key, certificate), more

    def _answered(self, call: Callable[[], _Answer]) -> _Answer:
        try:
            return call()
        except grpc.RpcError as failed:
            raise error_of(failed, f"server {self.line.address}") from None

    def _sent(self, message: Any) -> bytes:
        data = message.SerializeToString()
        self.bytes_up += len(data)
        return data

    def _received(self, kind: type[Any]) -> Callable[[bytes], Any]:
        def read(data: bytes) -> Any:
            self.bytes_down += len(data)
            return kind.FromString(data)

        return read


def connect(
    line: JoinLine, *, patience: Patience, proof: Proof, known: bool, say: Callable[[str], None]
) -> Channel:
    """A channel to a server that may not be up yet.

    Args:
        line: where to.
        patience: `connect_s` is how long a server that we never spoke to is tried.
        proof: see `Proof`.
        known: whether a run with this server is under way: then it is tried for ever.
        say: hears of failures.

    Raises:
        LinkError: if a server that is not known does not answer in time. AccessError: if it is not the line's.
    """
    end, pause_s = time.monotonic() + patience.connect_s, 0.2
    while True:
        try:
            return Channel(line, patience=patience, proof=proof)
        except LinkError as failed:
            if not known and time.monotonic() + pause_s > end:
                raise
            if pause_s > 1:
                say(f"{failed}; trying again in {pause_s:.1f} s")
            time.sleep(pause_s * (1 - secrets.SystemRandom().random() / 2))
            pause_s = min(pause_s * 2, patience.longest_pause_s)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise AccessError(f"{path} cannot be read: {cause.strerror}; give a PEM file") from cause


def _check_loopback(host: str) -> None:
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"plaintext to {host} is refused: without TLS hosl talks to this machine only; leave it out"
        )
