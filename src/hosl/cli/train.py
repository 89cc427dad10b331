"""`hosl train CONFIG.yaml [--a.b value]` and `hosl train --resume RUN`."""

import contextlib
import io
import sys

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import RUN_HELP, named_run
from hosl.config import Config, load_config
from hosl.config.former_names import FORMER_NAMES
from hosl.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Train; the summary goes to standard output, progress to standard error.

    Returns the exit status: 130 after Ctrl-C.

    Raises:
        RequestError: if an argument or the config is impossible, or the folder holds no run.
        FailureError: if the training fails.
    """
    parser = command_parser(
        "train", "Fine-tune a split model. Any setting of the config can be given as --a.b value."
    )
    parser.add_argument(
        "config", nargs="?", help="a YAML file; the settings that can stand in it follow below"
    )
    parser.add_argument("--resume", metavar="RUN", help=f"go on from the newest checkpoint of {RUN_HELP}")
    parser.add_argument(
        "--max-steps", metavar="N", help="with --resume: train a finished run further, to step N"
    )
    if {"-h", "--help"} & set(arguments):
        parser.print_help()
        overridden(Config(), ["--help"])
        return 0
    options, overrides = parser.parse_known_args(arguments)
    steps = [] if options.max_steps is None else ["--max-steps", options.max_steps]
    if options.config is None and options.resume is None:
        raise ConfigError("hosl train: give either a CONFIG.yaml or --resume RUN")
    if options.resume is not None and (overrides or options.config is not None):
        rest = " ".join([*overrides, options.config or ""]).rstrip()
        raise ConfigError(
            f"hosl train --resume keeps the run's own settings, --max-steps apart; leave out {rest}"
        )
    config = None
    if options.config is not None:
        config = overridden(load_config(options.config), [*steps, *overrides])

    from hosl.training.train import resume, start  # torch and transformers, only now

    if options.resume is not None:
        more = overridden(Config(), steps).max_steps if steps else None
        summary = resume(named_run(options.resume), max_steps=more)
    else:
        assert config is not None, "one of the two was given"
        summary = start(config)
    answer(summary, as_json=options.json)
    return 0 if summary["finished"] else 130


def overridden(config: Config, arguments: list[str]) -> Config:
    """The config with the settings changed that `arguments` name; --help prints all settings.

    Raises:
        ConfigError: if an argument is no setting, or its value is impossible.
    """
    import tyro

    arguments = [_with_new_name(argument) for argument in arguments]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if "--help" in arguments else messages):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[Config], default=config, args=arguments, prog="hosl train CONFIG.yaml",
                description="Settings, with the config's own values as defaults:",
            )  # fmt: skip
    except SystemExit as ended:
        if not ended.code:
            return config
        plain = " ".join(messages.getvalue().translate(str.maketrans("", "", "╭╮╰╯│─")).split())
        raise ConfigError(plain) from None


def _with_new_name(argument: str) -> str:
    """The argument with the present name of its setting: `--zo.law` was renamed, for example."""
    option, equals, value = argument.partition("=")
    for path, new in FORMER_NAMES.items():
        if option.replace("_", "-") == f"--{path}".replace("_", "-"):
            now = f"--{path.partition('.')[0]}.{new}"
            sys.stderr.write(
                f"hosl: {option} is called {now} now; the former name is read until version 0.3\n"
            )
            return now + equals + value
    return argument
