"""`hosl join OUT/client --to LINE --config task.yaml`: train this device's half with a server."""

import sys
from pathlib import Path

from hosl.cli.answers import answer, verb_parser
from hosl.cli.train import overridden
from hosl.config import load_config
from hosl.errors import ConfigError


def run(words: list[str]) -> int:
    """Train; summary on standard output, progress on standard error. The same command goes on after an interruption."""
    parser = verb_parser("join", "Train a client half with a server. Settings of the config as --a.b value.")
    parser.add_argument("half", help="OUT/client of `hosl split`")
    parser.add_argument(
        "--to", required=True, metavar="LINE", help="the join line, in quotes; or @FILE that holds it"
    )
    parser.add_argument("--config", required=True, help="a YAML file, as for `hosl train`")
    parser.add_argument("--authority", help="PEM file of the authority behind the server's certificate")
    parser.add_argument("--certificate", help="PEM file of our own certificate (mTLS); with --key")
    parser.add_argument("--key", help="PEM file of its private key")
    parser.add_argument("--plaintext", action="store_true", help="no TLS; to a loopback address only")
    known, overrides = parser.parse_known_args(words)
    if (known.certificate is None) != (known.key is None):
        raise ConfigError("--certificate and --key go together; give both or neither")
    config = overridden(load_config(known.config), overrides)

    from hosl.network.join import JoinOptions, join
    from hosl.transport.channel import Proof
    from hosl.transport.join_line import JoinLine

    line = known.to
    if line.startswith("@"):
        try:
            line = Path(line[1:]).read_text(encoding="utf-8")
        except OSError as cause:
            raise ConfigError(f"--to {known.to}: {cause.strerror}; the file holds one join line") from cause
    proof = Proof(
        authority=Path(known.authority) if known.authority else None,
        identity=(Path(known.certificate), Path(known.key)) if known.certificate else None,
        plaintext=known.plaintext,
    )
    options = JoinOptions(half=Path(known.half), line=JoinLine.parse(line), proof=proof)
    summary = join(config, options, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    answer(summary, as_json=known.json)
    return 0 if summary["finished"] else 130
