"""The arguments and the result of a command: argparse reads the arguments, the result is text or JSON."""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hosl.errors import ConfigError

if TYPE_CHECKING:
    from hosl.transport.channel import Proof
    from hosl.transport.join_line import JoinLine


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


def add_connection(parser: Parser, *, required: bool) -> None:
    """Add the arguments of a command that speaks to a server; `connection` reads them."""
    parser.add_argument(
        "--to", required=required, metavar="LINE", help="the join line, in quotes; or @FILE that holds it"
    )
    parser.add_argument("--authority", help="PEM file of the authority behind the server's certificate")
    parser.add_argument("--certificate", help="PEM file of our own certificate (mTLS); with --key")
    parser.add_argument("--key", help="PEM file of its private key")
    parser.add_argument("--plaintext", action="store_true", help="no TLS; to a loopback address only")


def connection(options: argparse.Namespace) -> "tuple[JoinLine, Proof]":
    """The server of a command's arguments, and how the two sides prove who they are.

    Raises:
        ConfigError: if one of a pair is missing, or the file of the line cannot be read.
        AccessError: if it holds no join line.
    """
    if (options.certificate is None) != (options.key is None):
        raise ConfigError("--certificate and --key go together; give both or neither")

    from hosl.transport.channel import Proof
    from hosl.transport.join_line import JoinLine

    line = options.to
    if line.startswith("@"):
        try:
            line = Path(line[1:]).read_text(encoding="utf-8-sig", errors="replace")
        except OSError as cause:
            raise ConfigError(f"--to {options.to}: {cause.strerror}; the file holds one join line") from cause
    proof = Proof(
        authority=Path(options.authority) if options.authority else None,
        identity=(Path(options.certificate), Path(options.key)) if options.certificate else None,
        plaintext=options.plaintext,
    )
    return JoinLine.parse(line), proof
