"""The arguments and the result of a command: argparse reads the arguments, the result is text or JSON."""

import argparse
import json
import sys
from importlib.util import find_spec
from typing import Any, NoReturn

from hosl.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises hosl's own error instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Refuse the arguments, in one line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}; `{self.prog} --help` shows what is allowed")


def command_parser(command: str, description: str, *, as_json: bool = True) -> Parser:
    """The parser of one command, with --json where the command has a result."""
    parser = Parser(prog=f"hosl {command}", description=description)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def answer(result: dict[str, Any], *, as_json: bool) -> None:
    """Print a command's result: one JSON object, or `key: value` lines."""
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        sys.stdout.write("".join(f"{key}: {value}\n" for key, value in result.items()))


def need_torch() -> None:
    """Refuse a command whose work other processes do with torch, where there is no torch; it is not imported.

    Raises:
        ModuleNotFoundError: if it is not installed; `hosl.cli.main` says what to install.
    """
    if find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
