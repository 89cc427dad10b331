"""`hosl serve OUT/server --listen HOST:PORT`: the server process."""

from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser, command_parser
from hosl.errors import ConfigError

_ABOVE_0 = (
    "runs_at_once", "runs_per_client", "away", "seat_days", "idle", "calls_per_s", "tensor_limit", "cache_limit",
    "cache_total",
)  # fmt: skip
_FROM_0 = {"merge_tokens": "no merging", "adapter_slots": "all clients", "texts_at_once": "none"}
"""Argument -> what 0 means."""


def run(arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; the join line goes to standard output, the log to standard error.

    Returns the exit status.

    Raises:
        RequestError: if an argument, the half or the certificate cannot be used.
    """
    parser = command_parser(
        "serve", "Train a server half with the devices that join, and generate with it.", as_json=False
    )
    _add_arguments(parser)
    options = parser.parse_args(arguments)

    from hosl.network.serve import ServeOptions, serve
    from hosl.system.byte_sizes import parse_bytes

    layout = _layout(options)
    if layout is None:  # else each rank checks its own
        from hosl.methods.torch_parties import check_device

        check_device(options.device, "--device")

    _check_numbers(options)

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    asked = ServeOptions(
        half=Path(options.half), listen=options.listen, service=Path(options.service), page=options.page,
        public=options.public, certificate=path(options.certificate), key=path(options.key),
        client_authority=path(options.client_authority), plaintext=options.plaintext, device=options.device,
        runs_at_once=options.runs_at_once, away_s=options.away, seat_s=86400.0 * options.seat_days,
        runs_per_client=options.runs_per_client, disk_per_client_bytes=parse_bytes(options.disk_per_client),
        tensor_limit_bytes=options.tensor_limit << 20,
        tensor_total_bytes=options.tensor_total << 20, calls_per_s=options.calls_per_s, idle_s=options.idle,
        merge_tokens=options.merge_tokens, adapter_slots=options.adapter_slots, give_half=options.give_half,
        traces=options.traces,
        cache_limit_bytes=options.cache_limit << 20,
        cache_total_bytes=options.cache_total << 20, texts_at_once=options.texts_at_once,
    )  # fmt: skip
    if layout is None:
        serve(asked)
        return 0
    from hosl.ranks.serve import serve_ranks

    return serve_ranks(asked, layout)


def _check_numbers(options: Any) -> None:
    """Refuse limits by which no run could be served.

    Raises:
        ConfigError: naming the argument.
    """
    for flag in _ABOVE_0:
        if not getattr(options, flag) > 0:
            raise ConfigError(f"--{flag.replace('_', '-')} must be above 0, got {getattr(options, flag):g}")
    for flag, zero in _FROM_0.items():
        if getattr(options, flag) < 0:
            raise ConfigError(
                f"--{flag.replace('_', '-')} must be 0, for {zero}, or more; got {getattr(options, flag)}"
            )
    if options.tensor_total < 4 * options.tensor_limit:
        raise ConfigError(
            f"--tensor-total {options.tensor_total}: a call may have two activations of --tensor-limit "
            f"{options.tensor_limit}, as sent and unpacked; give {4 * options.tensor_limit} at least"
        )


def _layout(options: Any) -> Any:
    """The layout of several ranks, by the arguments; None: there is one.

    Raises:
        ConfigError: if arguments about several ranks come without them.
    """
    several = {
        "--ranks-per-copy": options.ranks_per_copy is not None, "--rows": options.rows != "split",
        "--keep-gathered": options.keep_gathered,
    }  # fmt: skip
    if options.ranks == 1 and any(several.values()):
        names = ", ".join(name for name, given in several.items() if given)
        raise ConfigError(f"{names}: these are about several ranks, and --ranks is 1; give --ranks too")
    if options.ranks == 1:
        return None
    from hosl.core.layout import Layout

    per_copy = options.ranks if options.ranks_per_copy is None else options.ranks_per_copy
    return Layout(
        ranks=options.ranks, per_copy=per_copy, rows=options.rows, keep_gathered=options.keep_gathered
    )


def _add_arguments(parser: Parser) -> None:
    parser.add_argument("half", help="OUT/server of `hosl split`")
    parser.add_argument(
        "--listen", default="127.0.0.1:7070", help="host:port, default 127.0.0.1:7070; port 0: any free one"
    )
    parser.add_argument(
        "--public", help="host:port that devices reach, if it is another; stands in the join lines"
    )
    parser.add_argument("--service", default="runs/service", help="folder of certificate, clients and runs")
    parser.add_argument("--page", help="host:port of the live page, /metrics and /health; default: none")
    parser.add_argument("--certificate", help="PEM file, instead of the one made on first start; with --key")
    parser.add_argument("--key", help="PEM file of the certificate's private key")
    parser.add_argument(
        "--client-authority", help="PEM file; clients must show a certificate that it signed (mTLS)"
    )
    parser.add_argument("--plaintext", action="store_true", help="no TLS; loopback only")
    parser.add_argument("--device", default="cpu", help="a torch device")
    parser.add_argument(
        "--runs-at-once", type=int, default=1, help="runs whose halves are in memory together"
    )
    parser.add_argument(
        "--away", type=float, default=600.0, help="seconds without a call until a run makes room for another"
    )
    parser.add_argument("--tensor-limit", type=int, default=256, help="MiB that one activation may take")
    parser.add_argument(
        "--tensor-total",
        type=int,
        default=2048,
        help="MiB that activations of all clients may take together; a call that does not fit waits",
    )
    parser.add_argument(
        "--merge-tokens",
        type=int,
        default=512,
        help="tokens of questions of a run's several devices that are answered in one forward pass; 0: each alone",
    )
    parser.add_argument("--calls-per-s", type=int, default=200, help="of one client, on average")
    parser.add_argument(
        "--idle", type=float, default=60.0, help="seconds without a sign of life before a call is dropped"
    )
    parser.add_argument(
        "--cache-limit", type=int, default=256, help="MiB of keys and values for one client's generated texts"
    )
    parser.add_argument("--cache-total", type=int, default=1024, help="MiB of them for all clients")
    parser.add_argument(
        "--texts-at-once", type=int, default=4, help="texts that are generated at once; 0: none ever"
    )
    parser.add_argument(
        "--adapter-slots",
        type=int,
        default=0,
        help="clients whose own adapters (clients.server) are on the device at once; default: all of a run",
    )
    parser.add_argument(
        "--give-half",
        action="store_true",
        help="let the devices of a run have the server's half (hosl merge)",
    )
    _add_rank_arguments(parser)
    _add_operation(parser)


def _add_rank_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--ranks", type=int, default=1, help="processes that hold the half together, one GPU each; default 1"
    )
    parser.add_argument(
        "--ranks-per-copy",
        type=int,
        help="ranks that share one copy of the weights; default: all. 1: each has all weights, and a share of the rows",
    )
    parser.add_argument(
        "--rows",
        choices=("split", "all"),
        default="split",
        help="all: every rank computes every row, for the bits of one process",
    )
    parser.add_argument(
        "--keep-gathered",
        action="store_true",
        help="weights that the ranks of a copy put together stay so until they change: more memory, fewer gathers",
    )


def _add_operation(parser: Parser) -> None:
    parser.add_argument(
        "--seat-days",
        type=float,
        default=30.0,
        help="days without a call until a client's seat in a full run is free for another; its runs stay",
    )
    parser.add_argument(
        "--runs-per-client",
        type=int,
        default=100,
        help="runs with checkpoints that one client may have begun",
    )
    parser.add_argument(
        "--disk-per-client",
        default="64GiB",
        help="size on disk of the runs that one client has begun, such as 500GB; more is refused, nothing deleted",
    )
    parser.add_argument(
        "--traces",
        metavar="URL",
        help="an OpenTelemetry collector (OTLP over HTTP) that gets a span of each call; default: none",
    )
