"""The options of the commands that generate: how tokens are chosen, and where an answer ends."""

import argparse
import sys
from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser

_NAMES = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def add_choice(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("--max-new-tokens", type=int, default=128, help="of an answer")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the most probable token; 1: by probability"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the most probable tokens up to this probability"
    )
    parser.add_argument("--top-k", type=int, default=0, help="draw from this many tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT",
        help="cut an answer before this text; may be given several times",
    )  # fmt: skip


def given_choice(parser: Parser, options: argparse.Namespace) -> list[str]:
    """The options of a choice that are not left at their defaults, as they are written."""
    return [
        f"--{name.replace('_', '-')}" for name in _NAMES if getattr(options, name) != parser.get_default(name)
    ]


def wanted_answers(
    options: argparse.Namespace, *, chat: bool = False, chat_template: Path | None = None
) -> Any:
    """What is wanted of the answers, a `hosl.inference.text_model.Wanted`.

    Raises:
        ConfigError: if an option is impossible.
    """
    from hosl.inference.answering import Ending
    from hosl.inference.decoding import Sampling
    from hosl.inference.text_model import Wanted

    sampling = Sampling(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed
    )
    if sampling.unused:
        sys.stderr.write(
            f"hosl: --{' and --'.join(sampling.unused)} change nothing: at temperature 0 the most probable token is "
            "taken; to draw, give --temperature, such as 0.8\n"
        )
    Ending(most_tokens=options.max_new_tokens, stop=tuple(options.stop))
    return Wanted(
        sampling=sampling, max_new_tokens=options.max_new_tokens, stop=tuple(options.stop), chat=chat,
        chat_template=chat_template,
    )  # fmt: skip
