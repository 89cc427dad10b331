"""How a verb takes its words and gives its result: argparse for the words, text or JSON for the result."""

import argparse
import json
import sys
from typing import Any, NoReturn

from hosl.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse that raises hosl's own error instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Refuse the words, in one line."""
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` shows what is allowed")


def verb_parser(verb: str, description: str, *, as_json: bool = True) -> Parser:
    """A parser for one verb, with --json where it has a result."""
    parser = Parser(prog=f"hosl {verb}", description=description)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def answer(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a verb's result: one JSON object, or `key: value` lines."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write("".join(f"{key}: {value}\n" for key, value in result.items()))
