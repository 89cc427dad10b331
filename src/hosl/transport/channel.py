"""One connection to a server: pinned TLS, the token with every call (RPC), gRPC's errors as hosl's own, retries.

The timeouts are in `Patience`, the messages in `hosl.wire`; `hosl.parties.remote.server` makes the calls.
"""

import ipaddress
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from hosl.errors import AccessError, BusyError, ConfigError, LinkError, WireError
from hosl.transport.join_line import JoinLine, pinned_certificate, refused_certificate
from hosl.transport.status import error_of
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import CHUNK_BYTES

SERVICE = "hosl.v1.Server"
MESSAGE_BYTES = CHUNK_BYTES + (1 << 16)
"""The largest message that either side accepts: a chunk, or a request with its targets."""

_Reply = TypeVar("_Reply")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """The timeouts of a connection. Compute has none: a slow server that answers pings is waited for."""

    connect_s: float = 10.0
    """The time for the first connection; later ones are tried for ever."""
    idle_s: float = 60.0
    """The time without any sign of life from the other side."""
    longest_pause_s: float = 30.0
    """The longest pause between two tries. Pauses double from 0.2 s; each is shortened at random, by up to a half."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The credentials of the two sides beyond the token and the fingerprint of a join line."""

    authority: Path | None = None
    """A PEM file of the authority that signed the server's certificate; for lines without a fingerprint."""
    identity: tuple[Path, Path] | None = None
    """PEM files of our own certificate and key, for a server that wants one (mTLS)."""
    plaintext: bool = False
    """Whether to go without TLS; only to a loopback address."""


class Channel:
    """Calls to one server, for one thread that calls and one that sends; not for more threads at once."""

    def __init__(
        self, line: JoinLine, *, patience: Patience | None = None, proof: Proof | None = None
    ) -> None:
        """Connect for the first time.

        Raises:
            AccessError: if the certificate is not the one of the join line.
            ConfigError: if plaintext is asked for beyond loopback.
            LinkError: if no server answers in time.
        """
        self.line, self.patience = line, patience or Patience()
        self._proof = proof or Proof()
        self.bytes_up = self.bytes_down = 0
        self.stopping: Callable[[], bool] = lambda: False
        """Whether the run is to end: a server that is away is then waited for no longer."""
        self._closed = threading.Event()
        self._open()

    def close(self) -> None:
        """Close the connection; calls that are under way, in any thread, end."""
        self._closed.set()
        self._channel.close()

    def pause(self, seconds: float) -> None:
        """Wait, but no longer than until the connection is closed or the run is to end."""
        end_s = time.monotonic() + seconds
        while not self.stopping() and (left_s := end_s - time.monotonic()) > 0:
            if self._closed.wait(min(left_s, 0.2)):
                return

    def ask(self, name: str, request: Any, reply_type: type[_Reply]) -> _Reply:
        """Make a call of one request message and one reply message; returns the reply."""
        stub = self._channel.unary_unary(f"/{SERVICE}/{name}", request_serializer=self._serialise)
        return self._parsed(
            name, self._mapping_errors(lambda: stub(request, metadata=self._metadata)), reply_type
        )

    def leave(self, session: str) -> None:
        """Tell the server that a session ends, if it hears it within a second."""
        stub = self._channel.unary_unary(
            f"/{SERVICE}/Leave", request_serializer=pb.LeaveRequest.SerializeToString
        )
        with suppress(grpc.RpcError):
            stub(pb.LeaveRequest(where=pb.Where(session=session)), metadata=self._metadata, timeout=1.0)

    def upload(self, name: str, frames: Iterable[pb.Upload], reply_type: type[_Reply]) -> _Reply:
        """Make a call of many request messages and one reply message; returns the reply."""
        stub = self._channel.stream_unary(f"/{SERVICE}/{name}", request_serializer=self._serialise)
        return self._parsed(
            name, self._mapping_errors(lambda: stub(iter(frames), metadata=self._metadata)), reply_type
        )

    def converse(
        self, name: str, frames: Iterable[Any], reply_type: type[_Reply]
    ) -> Generator[_Reply, None, None]:
        """Make a call of many messages both ways; the call is cancelled when the caller stops reading."""
        stub = self._channel.stream_stream(f"/{SERVICE}/{name}", request_serializer=self._serialise)
        call = stub(iter(frames), metadata=self._metadata)
        try:
            while (part := self._mapping_errors(lambda: next(call, None))) is not None:
                yield self._parsed(name, part, reply_type)
        finally:
            call.cancel()

    def for_ever(self, work: Callable[[], _Reply], say: Callable[[str], None]) -> _Reply:
        """Do `work`, again while the link fails or the server is busy, and return its result.

        The pauses between tries grow and are jittered; longer ones are announced by `say`.

        Raises:
            LinkError, BusyError: if the run is to end, or the connection was closed.
        """
        pause_s, jitter = 0.2, secrets.SystemRandom()
        while True:
            try:
                return work()
            except (LinkError, BusyError) as lost:
                wait_s = pause_s * (1 - jitter.random() / 2)
                if pause_s > 1:
                    say(f"{lost}; trying again in {wait_s:.1f} s")
                self.pause(wait_s)
                if self.stopping() or self._closed.is_set():
                    raise
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
        if self._proof.plaintext or self.line.fingerprint:
            # the address is that of the line, whatever http_proxy says: a proxy would see a token without TLS
            options.append(("grpc.enable_http_proxy", 0))
        if self._proof.plaintext:
            _check_loopback(self.line.host)
            self._channel = grpc.insecure_channel(self.line.address, options)
        else:
            credentials, tls_options = self._credentials()
            self._channel = grpc.secure_channel(self.line.address, credentials, options + tls_options)
        self._metadata = (("authorization", f"Bearer {self.line.token}"),)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=self.patience.connect_s)
        except grpc.FutureTimeoutError:
            self._channel.close()
            self._check_proof()
            raise LinkError(
                f"no hosl server answers at {self.line.address} within {self.patience.connect_s:g} s; check the "
                "address, that `hosl serve` runs there, and which certificates either side wants"
            ) from None

    def _check_proof(self) -> None:
        """Find out whether a server answers that only wants to be trusted otherwise, which gRPC does not tell.

        Raises:
            AccessError: if it speaks TLS and plaintext is asked for, or the other way round, or its certificate is
                not one that the line or an authority vouches for.
        """
        if self.line.fingerprint and not self._proof.plaintext:
            return  # `pinned_certificate` has looked
        authority = self._proof.authority
        try:
            fault = refused_certificate(
                self.line, str(authority) if authority else None, timeout_s=self.patience.connect_s
            )
        except OSError:
            return
        unknown = isinstance(fault, ssl.SSLCertVerificationError)
        if self._proof.plaintext:
            if unknown or fault is None:
                raise AccessError(f"the server at {self.line.address} speaks TLS: leave --plaintext out")
        elif unknown:
            raise AccessError(
                f"the join line lacks the fingerprint of the certificate of {self.line.address}, for which no "
                f"authority {'of ' + str(authority) if authority else 'known here'} vouches ({fault.verify_message}): "
                "copy the whole line hosl://host:port#token.fingerprint that `hosl serve` or `hosl clients add` "
                "printed, or give --authority FILE where the server has a certificate of your own"
            )
        elif fault is not None:
            raise AccessError(
                f"the server at {self.line.address} speaks no TLS: one that was started with --plaintext is joined "
                "with --plaintext, on the same machine only"
            )

    def _credentials(self) -> tuple[Any, list[tuple[str, Any]]]:
        """gRPC's credentials, and the options of a channel with them."""
        identity, key, certificate = self._proof.identity, None, None
        if identity:
            certificate, key = (_read_pem(path) for path in identity)
        if self.line.fingerprint:
            files = (str(identity[0]), str(identity[1])) if identity else None
            root = pinned_certificate(self.line, timeout_s=self.patience.connect_s, identity=files)
            # the certificate is pinned: the host name in it proves nothing more
            options = [("grpc.ssl_target_name_override", "hosl")]
        else:
            root = _read_pem(self._proof.authority) if self._proof.authority else None
            options = []
        return grpc.ssl_channel_credentials(root, key, certificate), options

    def _mapping_errors(self, call: Callable[[], _Reply]) -> _Reply:
        try:
            return call()
        except grpc.RpcError as failed:
            raise error_of(failed, f"server {self.line.address}") from None
        except ValueError as failed:  # gRPC's, of a channel that was closed
            if not self._closed.is_set():
                raise
            raise LinkError(f"the connection to {self.line.address} was closed") from failed

    def _serialise(self, message: Any) -> bytes:
        data = message.SerializeToString()
        self.bytes_up += len(data)
        return data

    def _parsed(self, name: str, data: bytes | None, kind: type[_Reply]) -> _Reply:
        """A reply from its bytes; gRPC would take bytes that it cannot parse for a broken link, to be tried again."""
        message: Any = kind
        try:
            if data is not None:
                self.bytes_down += len(data)
                return message.FromString(data)
        except DecodeError:
            pass
        raise WireError(
            f"server {self.line.address}: the reply to {name} is {'empty' if data is None else f'{len(data)} bytes'}, "
            f"no {kind.__name__} of protocol 1"
        )


def connect(
    line: JoinLine, *, patience: Patience, proof: Proof, known: bool, say: Callable[[str], None]
) -> Channel:
    """A channel to a server that may not be up yet.

    Args:
        line: the address of the server and the token.
        patience: its `connect_s` is the time in which a server that is not `known` must answer.
        proof: see `Proof`.
        known: whether a run with this server is under way: then it is tried for ever.
        say: is called with a line of text about failures.

    Raises:
        LinkError: if a server that is not known does not answer in time.
        AccessError: if its certificate is not the one of the join line.
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


def _read_pem(path: Path) -> bytes:
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
