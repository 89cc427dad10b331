"""`hosl join OUT/client --to LINE --config task.yaml`: train this device's half with a server."""

import sys
from pathlib import Path

from hosl.cli.answers import (
    add_connection,
    add_runtime,
    answer,
    command_parser,
    connection,
    options_and_settings,
)
from hosl.cli.train import overridden
from hosl.config import load_config, read_yaml
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
    parser.add_argument("--config", required=True, help="a YAML file, as for `hosl train`")
    add_connection(parser, required=True)
    parser.add_argument(
        "--give-half",
        action="store_true",
        help="at the end, give this device's half to the server (hosl merge)",
    )
    parser.add_argument(
        "--go-back", action="store_true", help="go on, or begin, where one side has lost its checkpoints"
    )
    add_runtime(parser)
    options, overrides = options_and_settings(parser, arguments, "half")
    if any("hosl://" in word for word in overrides):  # an error about it would show the token
        raise ConfigError("a join line stands where none is read; it goes behind --to, in quotes")

    line, proof = connection(options)  # first: the rest of a line torn in two stands among the settings
    config = overridden(load_config(options.config), overrides)

    from hosl.network.join import JoinOptions, join

    target = JoinOptions(
        half=Path(options.half), line=line, proof=proof, give_half=options.give_half,
        may_go_back=options.go_back, runtime=options.runtime,
        method_named=_names_method(options.config, overrides),
    )  # fmt: skip
    summary = join(config, target, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201
    answer(summary, as_json=options.json)
    return 0 if summary["finished"] else 130


def _names_method(file: str, overrides: list[str]) -> bool:
    """Whether a config file that can be read, or a setting behind it, says the method."""
    content = read_yaml(file, kind="config", instead="")
    return (isinstance(content, dict) and "method" in content) or any(
        word.partition("=")[0] == "--method" for word in overrides
    )
