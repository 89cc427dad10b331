"""`hosl serve`: the server process, from a half's folder to a listening service, and its orderly end."""

import asyncio
import json
import os
import resource
import shutil
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hosl.config import Config
from hosl.errors import ConfigError, HandshakeError
from hosl.network.handshake import config_of
from hosl.service.hosted_half import HostedBank, HostedHalf, OpenHalf
from hosl.split.reading.half_json import half_facts
from hosl.system.allocator import keep_freed_memory
from hosl.system.readable import readable_bytes
from hosl.system.run_folder import RunLock
from hosl.transport.join_line import JoinLine, address_of, check_public
from hosl.wire import hosl_pb2 as pb

_TLS12_CIPHER = {"ec": "ECDHE-RSA-AES256-GCM-SHA384", "rsa": "ECDHE-ECDSA-AES256-GCM-SHA384"}
"""Kind of key -> a TLS 1.2 cipher for the other kind: gRPC cannot refuse TLS 1.2, but no such handshake succeeds."""

_MOST_FILES = 8192
_JOURNAL_BYTES = 256 << 20
"""The largest journal of a client that is taken."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """The arguments of `hosl serve`."""

    half: Path
    """The folder of the server half: OUT/server of `hosl split`."""
    listen: str = "127.0.0.1:7070"
    """host:port; port 0 is any free one."""
    service: Path = Path("runs/service")
    """The folder of the certificate, the clients and the runs."""
    page: str | None = None
    """host:port of the live page, metrics and health check; None: no page."""
    public: str | None = None
    """host:port that join lines name; None: the listening one."""
    certificate: Path | None = None
    """PEM file; None: the certificate that the service makes at its first start."""
    key: Path | None = None
    """PEM file of the certificate's private key."""
    client_authority: Path | None = None
    """PEM file of the authority whose certificates clients must show (mTLS)."""
    plaintext: bool = False
    """Whether to serve without TLS; on loopback only."""
    device: str = "cpu"
    """A torch device."""
    runs_at_once: int = 1
    """Runs whose halves are in memory together."""
    away_s: float = 600.0
    """Seconds without a call after which a run makes room for another one."""
    seat_s: float = 30 * 86400.0
    """Seconds without a call after which a client's seat in a full run is free for another client."""
    runs_per_client: int = 100
    """Runs with checkpoints that one client may have begun."""
    disk_per_client_bytes: int = 64 << 30
    """Bytes on disk of the runs that one client has begun."""
    tensor_limit_bytes: int = 256 << 20
    """The largest activation that is accepted."""
    tensor_total_bytes: int = 2 << 30
    """The activations of all clients that are held at once."""
    merge_tokens: int = 512
    """Tokens of questions of several clients of a run that are answered in one forward pass, at most; 0: none are."""
    calls_per_s: int = 200
    """Calls of one client per second, on average."""
    idle_s: float = 60.0
    """Seconds without a sign of life before a call is dropped."""
    cache_limit_bytes: int = 256 << 20
    """Keys and values that the texts of one client may take, when they are generated."""
    cache_total_bytes: int = 1 << 30
    """Keys and values of all clients."""
    texts_at_once: int = 4
    """Texts that are generated at once; 0: none."""
    adapter_slots: int = 0
    """The clients with adapters of their own whose weights are on the device at once; 0: all of a run."""
    traces: str | None = None
    """The address of an OpenTelemetry collector that gets a span of each call; None: no spans."""
    give_half: bool = False
    """Whether clients of a run may have the server's half of it."""
    say: Callable[[str], None] = field(default=lambda text: print_line(text))
    """Is called with each line for the person who starts the server."""


class _Credentials(NamedTuple):
    certificate: bytes
    """PEM."""
    key: bytes
    """PEM."""
    fingerprint: str | None
    """The fingerprint for join lines; None: an authority vouches for the certificate."""


def print_line(text: str) -> None:
    """Write one line on standard output, and flush it."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


Host = Callable[[Config, Sequence[str], bool], HostedHalf | HostedBank]
"""Makes the half of a run: (its settings, the names of weights that the checkpoint did not hold, synchronous)."""


def serve(options: ServeOptions, host: Host | None = None) -> None:
    """Serve until SIGTERM or SIGINT; then finish the work in hand and save every run.

    `host`: makes the halves of runs; None: in this process alone.

    Raises:
        RequestError: if the half, the address or the certificate cannot be used.
    """
    facts = half_facts(options.half, "server")
    name, port = parse_address(options.listen)
    for flag, address in (("--listen", options.listen), ("--page", options.page)):
        if options.plaintext and address and parse_address(address)[0] not in _LOOPBACK:
            raise ConfigError(f"plaintext is for loopback only, got {flag} {address}; leave --plaintext out")
    check_public(*_public(options, port or 1))  # refused before anything is made
    keep_freed_memory()
    options.service.mkdir(parents=True, exist_ok=True)
    with RunLock(options.service):
        credentials = _credentials(options)  # before grpc is loaded: it reads its cipher list once
        asyncio.run(_serve(options, (name, port), credentials, _opener(options, facts, host)))


def parse_address(text: str) -> tuple[str, int]:
    """The host and the port of a text host:port.

    Raises:
        ConfigError: if the text has another form.
    """
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"address {text!r} is not host:port with a port up to 65535, such as 0.0.0.0:7070")
    return host.strip("[]"), int(port)


async def _serve(
    options: ServeOptions,
    address: tuple[str, int],
    credentials: _Credentials | None,
    open_half: OpenHalf,
) -> None:
    import grpc.aio

    from hosl.service.access import Access
    from hosl.service.calls import Calls
    from hosl.service.limits import Limits
    from hosl.service.operation.quota import Quota
    from hosl.service.page import Page
    from hosl.service.scheduler import Scheduler
    from hosl.service.sessions import Sessions, save_all

    access, status = Access(options.service), _status(options)
    scheduler = Scheduler(options.merge_tokens, tell=status.answered_together, worked=status.worked)
    limits = Limits(
        tensor_bytes=options.tensor_limit_bytes, calls_per_s=options.calls_per_s,
        cache_bytes=options.cache_limit_bytes, cache_total_bytes=options.cache_total_bytes,
        texts_at_once=options.texts_at_once, tensor_total_bytes=options.tensor_total_bytes,
    )  # fmt: skip
    sessions = Sessions(
        options.service, open_half, status.damaged, revoked=access.revoked,
        runs_at_once=options.runs_at_once, away_s=options.away_s, seat_s=options.seat_s,
        quota=Quota(options.runs_per_client, options.disk_per_client_bytes),
    )  # fmt: skip
    giving = _giving(options, status.damaged)
    calls = Calls(access, sessions, scheduler, status, limits, idle_s=options.idle_s, giving=giving)
    _watch(status, options, scheduler, sessions, calls)
    server = grpc.aio.server(options=_server_options(limits.message_bytes, options.idle_s))
    server.add_generic_rpc_handlers((calls.handler(),))
    try:
        bound = _bind(server, address_of(*address), credentials, options)
    except RuntimeError as cause:
        raise ConfigError(f"{options.listen} cannot be listened on: {cause}; is the port taken?") from cause
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    page = None if options.page is None else Page(
        parse_address(options.page), access, status, _page_context(options)
    )  # fmt: skip
    await server.start()
    _announce(options, access, address[0], bound, credentials, page)
    status.ready = True
    async with _tended(options.service, sessions, scheduler, status):
        await ended.wait()
        status.ready = False
        status.line("draining")
        await server.stop(grace=5.0)  # calls in hand may end; new ones are refused
        await scheduler.run("drain", 0, lambda: save_all(sessions))
    scheduler.close()
    if page:
        page.close()
    status.line("stopped", **status.merged())
    if options.traces is not None:
        status.close()


def _status(options: ServeOptions) -> Any:
    """The counters, with spans where they are asked for; else nothing of them is imported, and no call does more."""
    if options.traces is None:
        from hosl.service.status import Status

        return Status()
    from hosl.service.operation.traces import traced_to

    return traced_to(options.traces)


def _watch(status: Any, options: ServeOptions, scheduler: Any, sessions: Any, calls: Any) -> None:
    """Let the metrics ask for what is known elsewhere."""
    status.watch_queue(lambda: scheduler.queue)
    status.watch_tensors(lambda: calls.room.taken_bytes)
    status.watch_disk(lambda: shutil.disk_usage(options.service).free)
    status.watch_runs(sessions.now)


@asynccontextmanager
async def _tended(service: Path, sessions: Any, scheduler: Any, status: Any) -> AsyncIterator[None]:
    """Let `hosl runs` see what this server does, and let the memory go of runs that it dropped."""
    from hosl.service.operation.live_files import PERIOD_S, LiveFiles

    files = LiveFiles(service, sessions.now, status.unwritten)

    async def tend() -> None:
        while True:
            try:
                await files.write()
                if sessions.dropped():
                    await scheduler.run("drop", 0, sessions.forget_dropped)
            except Exception as error:  # a bug of the server: logged with its trace, and tried again
                status.broke("server", "tend", error)
            await asyncio.sleep(PERIOD_S)

    task = asyncio.create_task(tend())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        files.close()


def _server_options(message_bytes: int, idle_s: float) -> list[tuple[str, int]]:
    """gRPC's options of the server: message size, signs of life, and bounds on those who only connect."""
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.so_reuseport", 0),
        ("grpc.server_handshake_timeout_ms", 5000),  # a connection that says nothing is closed
        ("grpc.max_connection_idle_ms", int(max(idle_s, 60.0) * 1000)),
        (
            "grpc.max_allowed_incoming_connections",
            _raised_file_limit() // 2,
        ),  # the other half is for the runs
        ("grpc.max_concurrent_streams", 64),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_time_ms", int(idle_s * 500)),
        ("grpc.keepalive_timeout_ms", int(idle_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def _raised_file_limit() -> int:
    """The number of files that this process may have open, raised as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _bind(server: Any, address: str, credentials: _Credentials | None, options: ServeOptions) -> int:
    import grpc

    if credentials is None:
        return server.add_insecure_port(address)
    pairs = [(credentials.key, credentials.certificate)]
    authority = _read(options.client_authority) if options.client_authority else None
    tls = grpc.ssl_server_credentials(pairs, authority, require_client_auth=authority is not None)
    return server.add_secure_port(address, tls)


def _credentials(options: ServeOptions) -> _Credentials | None:
    """The server's credentials; None: plaintext."""
    from hosl.service.access import certificate
    from hosl.transport.join_line import fingerprint_of

    if options.plaintext:
        return None
    if (options.certificate is None) != (options.key is None):
        raise ConfigError("--certificate and --key go together; give both, or neither to have one made")
    if options.certificate and options.key:
        credentials = _Credentials(_read(options.certificate), _read(options.key), None)
    else:
        pem, key, der = certificate(options.service)
        credentials = _Credentials(pem, key, fingerprint_of(der))
    kind = "rsa" if _is_rsa(credentials.key) else "ec"
    os.environ["GRPC_SSL_CIPHER_SUITES"] = _TLS12_CIPHER[kind]
    return credentials


def _is_rsa(key: bytes) -> bool:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        return isinstance(load_pem_private_key(key, None), RSAPrivateKey)
    except (ValueError, TypeError) as cause:
        raise ConfigError(
            f"the key file holds no readable private key without a password: {cause}"
        ) from cause


def _page_context(options: ServeOptions) -> ssl.SSLContext | None:
    if options.plaintext:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(
        options.certificate or options.service / "certificate.pem", options.key or options.service / "key.pem"
    )
    return context


def _opener(options: ServeOptions, facts: dict[str, Any], host: Host | None) -> OpenHalf:
    """The function that opens the half for a Hello, and refuses a Hello for another half."""
    make = host or _in_this_process(options)

    def open_half(model: pb.Model, training: pb.Training) -> HostedHalf | HostedBank:
        ours = pb.Model(
            family=facts["family"], cut=facts["cut"], base_digest=facts["base_digest"],
            client_digest=facts["client_digest"], server_digest=facts["server_digest"], dtype=model.dtype,
            labels=pb.LABELS_AT_CLIENT if facts.get("labels") == "client" else pb.LABELS_AT_SERVER,
        )  # fmt: skip
        for field_ in ours.DESCRIPTOR.fields:
            mine, theirs = getattr(ours, field_.name), getattr(model, field_.name)
            if mine != theirs:
                raise HandshakeError(
                    f"the halves do not fit: {field_.name} is {str(mine)[:16]} on the server and {str(theirs)[:16]} on "
                    "the client; use both folders of one `hosl split`"
                )
        config = config_of(model, training, device=options.device)
        return make(config, facts.get("new_weights", ()), training.order == pb.SYNCHRONOUS)

    return open_half


def _in_this_process(options: ServeOptions) -> Host:
    from hosl.methods.torch_parties import DTYPES, make_server
    from hosl.network.personal_hosting import PersonalBank
    from hosl.network.torch_hosting import TorchHosted
    from hosl.split import load_half

    def host(config: Config, new_weights: Sequence[str], synchronous: bool) -> HostedHalf | HostedBank:
        def fresh() -> Any:
            return load_half(options.half, DTYPES[config.model.dtype])

        if config.clients.server == "personal":
            return PersonalBank(config, fresh(), new_weights, slots=options.adapter_slots or None)
        return TorchHosted(config, lambda: make_server(config, fresh(), new_weights, synchronous=synchronous))

    return host


def _giving(options: ServeOptions, say: Callable[[str], None]) -> Any:
    from hosl.service.giving import Giving

    def most_bytes() -> int:
        from hosl.split.artifact import client_elements

        return 2 * 4 * client_elements(options.half) + _JOURNAL_BYTES  # adapters are fewer than the weights

    return Giving(
        runs=options.service / "runs",
        half=options.half,
        allowed=options.give_half,
        most_bytes=most_bytes,
        say=say,
    )


def _announce(
    options: ServeOptions, access: Any, host: str, port: int, credentials: _Credentials | None, page: Any
) -> None:
    fingerprint = credentials.fingerprint if credentials else None
    public = _public(options, port)
    facts = {
        "address": address_of(*public), "fingerprint": fingerprint, "plaintext": credentials is None,
        "half": str(options.half.resolve()),
    }  # fmt: skip
    (options.service / "address.json").write_text(json.dumps(facts), encoding="utf-8")
    if not access.names():
        line = JoinLine(*public, access.enrol("first"), fingerprint)
        options.say(f"join line of client `first` (shown once; whoever has it is this client):\n{line}")
    else:
        names = ", ".join(client["name"] for client in access.names() if not client["revoked"])
        options.say(f"enrolled clients: {names or 'none'}; `hosl clients add NAME` prints a new join line")
    if options.give_half:
        options.say("clients of a run may fetch this server's half of it (--give-half)")
    options.say(f"state is kept in {options.service.resolve()}: certificate, clients, runs")
    options.say(
        f"each client: {options.runs_per_client} runs and {readable_bytes(options.disk_per_client_bytes)} on disk "
        f"(--runs-per-client, --disk-per-client); a seat is kept for {options.seat_s / 86400:g} days of silence"
    )
    options.say(_generation(options))
    options.say(_merging(options))
    options.say(
        f"serving {options.half} on {address_of(host, port)}" + (f"; live page on {page.url}" if page else "")
    )


def _generation(options: ServeOptions) -> str:
    """The line about what may be generated."""
    if not options.texts_at_once:
        return "nothing is generated (--texts-at-once 0)"
    return (
        f"generation: {options.texts_at_once} texts at once, with caches of up to {options.cache_limit_bytes >> 20:,} "
        f"MiB a client and {options.cache_total_bytes >> 20:,} MiB in all"
    )


def _merging(options: ServeOptions) -> str:
    """The line about questions that are answered together."""
    if not options.merge_tokens:
        return "each question is answered alone (--merge-tokens 0)"
    return (
        f"merging: questions of several devices of a run that wait are answered together, up to {options.merge_tokens} "
        "tokens (--merge-tokens)"
    )


def _public(options: ServeOptions, port: int) -> tuple[str, int]:
    """The host and the port that join lines name; `port` is the one that is listened on."""
    host, public_port = parse_address(options.public or options.listen)
    return host, public_port if options.public else port


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"{path} cannot be read: {cause.strerror}; give a PEM file") from cause
