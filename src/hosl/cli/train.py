"""`hosl train CONFIG.yaml [--a.b value]` and `hosl train --resume RUN`."""

import contextlib
import io
import sys
from pathlib import Path

from hosl.cli.answers import answer, verb_parser
from hosl.config import Config, load_config
from hosl.config.former_names import FORMER_NAMES
from hosl.errors import ConfigError


def run(words: list[str]) -> int:
    """Train; the summary goes to standard output, progress to standard error. 130 after Ctrl-C."""
    parser = verb_parser(
        "train", "Fine-tune a split model. Any setting of the config can be given as --a.b value."
    )
    parser.add_argument(
        "config", nargs="?", help="a YAML file; the settings that can stand in it follow below"
    )
    parser.add_argument("--resume", metavar="RUN", help="go on from the newest checkpoint of a run's folder")
    if {"-h", "--help"} & set(words):
        parser.print_help()
        overridden(Config(), ["--help"])
        return 0
    known, overrides = parser.parse_known_args(words)
    if (known.config is None) == (known.resume is None):
        raise ConfigError("hosl train: give either a CONFIG.yaml or --resume RUN")
    if known.resume and overrides:
        raise ConfigError(
            f"hosl train --resume keeps the run's own settings; leave out {' '.join(overrides)}"
        )
    config = None if known.resume else overridden(load_config(known.config), overrides)

    from hosl.training.train import resume, start  # torch and transformers, only now

    summary = start(config) if config is not None else resume(Path(known.resume))
    answer(summary, as_json=known.json)
    return 0 if summary["finished"] else 130


def overridden(config: Config, words: list[str]) -> Config:
    """`config` with the settings that `words` name changed; --help prints them all.

    Raises:
        ConfigError: if a word is no setting, or its value is impossible.
    """
    import tyro

    words = [_with_new_name(word) for word in words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(sys.stderr if "--help" in words else said):
            return tyro.cli(
                tyro.conf.AvoidSubcommands[Config], default=config, args=words, prog="hosl train CONFIG.yaml",
                description="Settings, with the config's own values as defaults:",
            )  # fmt: skip
    except SystemExit as ended:
        if not ended.code:
            return config
        plain = " ".join(said.getvalue().translate(str.maketrans("", "", "╭╮╰╯│─")).split())
        raise ConfigError(plain) from None


def _with_new_name(word: str) -> str:
    """`--zo.law` by its name of now."""
    option, given, value = word.partition("=")
    for path, new in FORMER_NAMES.items():
        if option.replace("_", "-") == f"--{path}".replace("_", "-"):
            now = f"--{path.partition('.')[0]}.{new}"
            sys.stderr.write(
                f"hosl: {option} is called {now} now; the former name is read until version 0.3\n"
            )
            return now + given + value
    return word
