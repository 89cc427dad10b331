"""`hosl join OUT/client --to LINE --config task.yaml`: train this device's half with a server."""

import sys
from pathlib import Path

from hosl.cli.answers import answer, command_parser, options_and_settings
from hosl.cli.train import overridden
from hosl.config import load_config
from hosl.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Train; the summary goes to standard output, progress to standard error. The same command resumes the run.

    Returns the exit status: 130 after Ctrl-C.

    Raises:
        RequestError: if an argument, the config or the half cannot be used, or the server refuses.
        FailureError: if the training fails.
    """
    parser = command_parser(
        "join", "Train a client half with a server. Settings of the config as --a.b value."
    )
    parser.add_argument("half", help="OUT/client of `hosl split`")
    parser.add_argument(
        "--to", required=True, metavar="LINE", help="the join line, in quotes; or @FILE that holds it"
    )
    parser.add_argument("--config", required=True, help="a YAML file, as for `hosl train`")
    parser.add_argument("--authority", help="PEM file of the authority behind the server's certificate")
    parser.add_argument("--certificate", help="PEM file of our own certificate (mTLS); with --key")
    parser.add_argument("--key", help="PEM file of its private key")
    parser.add_argument("--plaintext", action="store_true", help="no TLS; to a loopback address only")
    parser.add_argument(
        "--go-back", action="store_true", help="go on, or begin, where one side has lost its checkpoints"
    )
    options, overrides = options_and_settings(parser, arguments, "half")
    if (options.certificate is None) != (options.key is None):
        raise ConfigError("--certificate and --key go together; give both or neither")
    if any("hosl://" in word for word in overrides):  # an error about it would show the token
        raise ConfigError("a join line stands where none is read; it goes behind --to, in quotes")

    from hosl.transport.join_line import JoinLine

    text = options.to
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as cause:
            raise ConfigError(f"--to {text}: {cause.strerror}; the file holds one join line") from cause
    line = JoinLine.parse(text)  # first: the rest of a line that is torn in two stands among the settings
    config = overridden(load_config(options.config), overrides)

    from hosl.network.join import JoinOptions, join
    from hosl.transport.channel import Proof

    proof = Proof(
        authority=Path(options.authority) if options.authority else None,
        identity=(Path(options.certificate), Path(options.key)) if options.certificate else None,
        plaintext=options.plaintext,
    )
    target = JoinOptions(half=Path(options.half), line=line, proof=proof, may_go_back=options.go_back)
    summary = join(config, target, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    answer(summary, as_json=options.json)
    return 0 if summary["finished"] else 130
