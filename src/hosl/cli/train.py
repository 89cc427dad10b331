"""`hosl train CONFIG.yaml [--a.b value]` and `hosl train --resume RUN`."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec

from hosl.cli.answers import answer, command_parser, options_and_settings
from hosl.cli.run_argument import RUN_HELP, named_run
from hosl.config import Config, load_config
from hosl.config.files import number_as_yaml
from hosl.config.former_names import FORMER_NAMES
from hosl.errors import ConfigError, FailureError
from hosl.tasks import TaskConfig

_FRAME = r"[╭╮╰╯│─]|^\+- |\+?-{3,}\+?|^\||\|$"
"""The frame around tyro's errors, in Unicode and in ASCII."""


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
        words = [word for word in arguments if word not in ("-h", "--help")]
        asked, _ = options_and_settings(parser, words, "config")
        parser.print_help()
        _print_settings(load_config(asked.config) if asked.config else Config())
        return 0
    options, overrides = options_and_settings(parser, arguments, "config")
    steps = [] if options.max_steps is None else ["--max-steps", options.max_steps]
    if options.config is None and options.resume is None:
        form = "; settings stand behind it: `hosl train CONFIG.yaml --a.b value`" if overrides else ""
        raise ConfigError(f"hosl train: give either a CONFIG.yaml or --resume RUN{form}")
    if options.resume is not None and (overrides or options.config is not None):
        rest = " ".join([*overrides, options.config or ""]).rstrip()
        raise ConfigError(
            f"hosl train --resume keeps the run's own settings, --max-steps apart; leave out {rest}"
        )
    config = None
    if options.config is not None:
        config = overridden(load_config(options.config), [*steps, *overrides])

    from hosl.inference.own_metric import own_metric  # torch and transformers, only now
    from hosl.training.train import resume, run_config, start

    settings = run_config(named_run(str(options.resume))) if config is None else config
    metric = own_metric(settings)  # refused now, not after the run
    if metric is not None:
        sys.stderr.write(f"hosl: {metric.note}\n")
    if options.resume is not None:
        more = overridden(Config(), steps).max_steps if steps else None
        summary = resume(named_run(options.resume), max_steps=more)
    else:
        assert config is not None, "one of the two was given"
        summary = start(config)
    if metric is not None and summary["finished"]:
        summary |= judged(summary, metric, as_json=options.json)
    answer(summary, as_json=options.json)
    return 0 if summary["finished"] else 130


def judged(summary: dict[str, Any], metric: Any, *, as_json: bool) -> dict[str, float]:
    """The user's own metric over the answers of a finished run, kept in its folder; figures of the summary by name.

    Raises:
        FailureError: if the metric fails; the run is whole all the same, and its summary has been said.
    """
    from hosl.report.build import write_report
    from hosl.report.planned import planned_lines
    from hosl.system.progress import open_view

    run = Path(summary["run"])
    with open_view("answers", 0, len(metric.questions), unit="row") as view:
        try:
            figures = metric.of_run(run, done=lambda count: view.step(count, {}))
        except FailureError:
            if not as_json:  # there, the failure is the one object
                answer(summary, as_json=False)
            raise
    metric.keep(run, figures)
    write_report(run, planner=planned_lines)
    return {f"own_{name}": value for name, value in figures.items()}


def overridden(config: Config, arguments: list[str]) -> Config:
    """The config with the settings changed that `arguments` name; --help prints all settings.

    Raises:
        ConfigError: if an argument is no setting, or its value is impossible.
    """
    if not arguments:
        return config
    import tyro  # 5 MiB of a device's memory

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
        plain = " ".join(re.sub(_FRAME, "", messages.getvalue(), flags=re.MULTILINE).split())
        plain = re.sub(
            r" (Argument helptext:|For full helptext,).*|^Value error |Error parsing Config: ", "", plain
        )
        given = re.search(r"invalid literal for int\(\) with base 10: '([^']+)'", plain)
        number = number_as_yaml(given[1], whole=True) if given else None
        raise ConfigError(f"{plain}; write {number}" if number else plain) from None


def _print_settings(config: Config) -> None:
    """Print every setting with the config's value as default, then the settings of the other kinds of task."""
    import tyro

    overridden(config, ["--help"])
    for kind in get_args(TaskConfig):
        if not isinstance(config.task, kind):
            name = kind.__struct_config__.tag
            task = msgspec.defstruct("Task", [("task", kind)])
            with contextlib.suppress(SystemExit):
                tyro.cli(
                    task,
                    args=["--help"],
                    prog="hosl train CONFIG.yaml",
                    description=f"With task.kind: {name}:",
                )


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
