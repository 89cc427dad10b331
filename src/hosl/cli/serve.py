"""`hosl serve OUT/server --listen HOST:PORT`: the server process."""

from pathlib import Path

from hosl.cli.answers import verb_parser


def run(words: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; the join line goes to standard output, the log to standard error."""
    parser = verb_parser("serve", "Train a server half with the devices that join.", as_json=False)
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
    parser.add_argument("--tensor-limit", type=int, default=256, help="MiB that one activation may take")
    parser.add_argument("--calls-per-s", type=int, default=200, help="of one client, on average")
    parser.add_argument(
        "--idle", type=float, default=60.0, help="seconds without a sign of life before a call is dropped"
    )
    known = parser.parse_args(words)

    from hosl.network.serve import ServeOptions, serve

    def path(text: str | None) -> Path | None:
        return Path(text) if text else None

    serve(
        ServeOptions(
            half=Path(known.half), listen=known.listen, service=Path(known.service), page=known.page,
            public=known.public, certificate=path(known.certificate), key=path(known.key),
            client_authority=path(known.client_authority), plaintext=known.plaintext, device=known.device,
            runs_at_once=known.runs_at_once, tensor_limit_bytes=known.tensor_limit << 20,
            calls_per_s=known.calls_per_s, idle_s=known.idle,
        )
    )  # fmt: skip
    return 0
