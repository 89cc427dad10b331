"""`hosl serve OUT/server --listen HOST:PORT`: the server process."""

from pathlib import Path

from hosl.cli.answers import Parser, command_parser
from hosl.errors import ConfigError


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

    from hosl.methods.torch_parties import check_device
    from hosl.network.serve import ServeOptions, serve

    check_device(options.device, "--device")

    if options.tensor_total < 4 * options.tensor_limit:
        raise ConfigError(
            f"--tensor-total {options.tensor_total}: a call may have two activations of --tensor-limit "
            f"{options.tensor_limit}, as sent and unpacked; give {4 * options.tensor_limit} at least"
        )

    if options.adapter_slots < 0:
        raise ConfigError(f"--adapter-slots must be 1 or more, or 0 for all, got {options.adapter_slots}")
    if options.merge_tokens < 0:
        raise ConfigError(f"--merge-tokens must be 0, for no merging, or more; got {options.merge_tokens}")

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    serve(
        ServeOptions(
            half=Path(options.half), listen=options.listen, service=Path(options.service), page=options.page,
            public=options.public, certificate=path(options.certificate), key=path(options.key),
            client_authority=path(options.client_authority), plaintext=options.plaintext, device=options.device,
            runs_at_once=options.runs_at_once, away_s=options.away, tensor_limit_bytes=options.tensor_limit << 20,
            tensor_total_bytes=options.tensor_total << 20, calls_per_s=options.calls_per_s, idle_s=options.idle,
            merge_tokens=options.merge_tokens, adapter_slots=options.adapter_slots, give_half=options.give_half,
            cache_limit_bytes=options.cache_limit << 20,
            cache_total_bytes=options.cache_total << 20, texts_at_once=options.texts_at_once,
        )
    )  # fmt: skip
    return 0


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
        help="clients whose own adapters (clients.server: personal) are on the device at once, others wait in the "
        "host's memory; default: all of a run",
    )
    parser.add_argument(
        "--give-half",
        action="store_true",
        help="let the devices of a run have the server's half (hosl merge)",
    )
