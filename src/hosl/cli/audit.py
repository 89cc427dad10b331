"""`hosl audit OUT/client --config task.yaml`: the fields that leave the device in this run, one by one."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser, answer, check_default, command_parser, options_and_settings, say
from hosl.cli.train import overridden
from hosl.config import load_config
from hosl.errors import ConfigError, ModelError

_say = partial(say, by="audit")


def run(arguments: list[str]) -> int:
    """Print the table; nothing is sent. Returns the exit status.

    Raises:
        RequestError, ModelError: if the config or the half cannot be read, or do not fit together.
    """
    parser = _parser()
    options, overrides = options_and_settings(parser, arguments, "half")
    _check(options, parser)
    config = overridden(load_config(options.config), overrides)

    from hosl.network.audit import audit
    from hosl.split.reading.half_json import half_facts
    from hosl.system.model_limits import model_limits
    from hosl.tasks import TextTokenizer, load_task
    from hosl.training.crossing import what_crosses

    folder = Path(options.half)
    half_facts(folder, "client")
    width = model_limits(folder).width
    if width is None:
        raise ModelError(f"{folder}/config.json names no hidden_size, n_embd or dim; split the model again")
    task = load_task(config.task, TextTokenizer.load(folder), seed=config.seed)
    if options.attack:
        from hosl.privacy.attack import attacked

        files = [None if name is None else Path(name) for name in (options.rows, options.own)]
        found = attacked(
            folder, config, task, file=files[0], own_file=files[1], rows=options.count, own_rows=options.own_count,
            tries=options.tries, public_model=options.public_model, say=_say,
        )  # fmt: skip
        if options.json:
            answer(found.facts(), as_json=True)
        else:
            sys.stdout.write("\n".join([*found.lines(), ""]))
        return 0
    rows = audit(config, task, width=width)
    crosses = what_crosses(config, task.head)
    lines = {"crosses": crosses} | {
        row["field"]: f"{row['sent']}; {row['shape']}; {row['bytes_per_step']:,} bytes a step; "
        f"a curious server learns {row['a curious server learns']}"
        for row in rows
    }
    facts: dict[str, Any] = {"crosses": crosses, "fields": rows}
    if config.wire.noise_multiplier:
        from hosl.privacy.accounting import spent

        try:
            losses = spent(config, task)
            facts["noise"] = [asdict(loss) for loss in losses]
            lines["noise"] = "; ".join(loss.line() for loss in losses)
        except ConfigError as none:  # the table stands without it
            facts["noise"], lines["noise"] = str(none), str(none)
    answer(facts if options.json else lines, as_json=options.json)
    return 0


def _parser() -> Parser:
    """The options of `hosl audit`."""
    parser = command_parser(
        "audit", "Every field that can leave the device. Settings of the config as --a.b value."
    )
    parser.add_argument("half", help="OUT/client of `hosl split`")
    parser.add_argument("--config", required=True, help="a YAML file, as for `hosl join`")
    parser.add_argument(
        "--attack", action="store_true", help="rebuild the task's texts from the half's activations, as a curious "
        "server could; minutes, with PyTorch",
    )  # fmt: skip
    parser.add_argument("--rows", metavar="FILE", help="attack these: lines of a .txt, or rows with `text`")
    parser.add_argument(
        "--own", metavar="FILE", help="the attacker's text; default: docstrings of Python's library"
    )
    parser.add_argument(
        "--count", type=int, default=100, help="rows to attack, at most; default: %(default)s"
    )
    parser.add_argument(
        "--own-count", type=int, default=500, help="rows of the attacker; default: %(default)s"
    )
    parser.add_argument(
        "--tries", type=int, default=64, help="tokens that the search tries at a position; with as many as the "
        "vocabulary has it finds them all where there is no noise, given time; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--public-model", metavar="MODEL", help="the model that the half was split from: the search then tries what it "
        "expects after the text so far, too",
    )  # fmt: skip
    return parser


def _check(options: Any, parser: Parser) -> None:
    """Refuse options that say nothing, and numbers below 1."""
    names = ("rows", "own", "count", "own_count", "tries", "public_model")
    if not options.attack:
        check_default(parser, options, names, "is about --attack")
    for name in names:
        value, option = getattr(options, name), f"--{name.replace('_', '-')}"
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"hosl audit {option} must be 1 or more, got {value}")
