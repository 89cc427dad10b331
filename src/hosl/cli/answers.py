"""The arguments and the result of a command: argparse reads the arguments, the result is text or JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
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


def say(text: str, *, by: str = "hosl") -> None:
    """Write a line for the person to standard error; `by` is the word that it begins with."""
    sys.stderr.write(f"{by}: {text}\n")


def options_and_settings(
    parser: Parser, arguments: list[str], first: str
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and the settings --a.b value among its arguments, which the parser does not know.

    `first` is the argument that stands before the settings. It may stand behind them: argparse alone would take the
    value of the first setting for it.

    Raises:
        ConfigError: if it is missing, and cannot be told from the values of settings.
    """
    _, unknown = parser.parse_known_args(arguments)
    own, runs = list[str](), list[list[str]]()
    of_setting = False
    for word in arguments:
        if word.startswith("--"):
            of_setting = word in unknown
            if of_setting:
                runs.append([])
        (runs[-1] if of_setting else own).append(word)
        of_setting = of_setting and not (word.startswith("--") and "=" in word)
    try:
        missing = getattr(parser.parse_known_args(own)[0], first) is None
    except ConfigError:
        missing = True
    behind = [run for run in runs if _is_yaml(run[-1]) or (len(run) > 2 and Path(run[-1]).exists())]
    if missing and len(behind) == 1:
        own.insert(0, behind[0].pop())
    try:
        options, rest = parser.parse_known_args(own)
    except ConfigError as error:
        form = f"; settings stand behind it: `{parser.prog} {first.upper()} --a.b value`"
        raise ConfigError(f"{error}{form if runs else ''}") from None
    return options, [*rest, *(word for run in runs for word in run)]


def _is_yaml(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and not word.startswith("--")


def check_default(parser: Parser, options: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Refuse options that were given though they say nothing, as another one is missing; `why` names it.

    Raises:
        ConfigError: naming the first one.
    """
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            raise ConfigError(f"{parser.prog} --{name.replace('_', '-')} {why}; add it")


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


def add_runtime(parser: Parser) -> None:
    """Add the option of a command in which this device computes its half with a server."""
    parser.add_argument(
        "--runtime",
        choices=("torch", "onnx"),
        help="what computes this device's half: PyTorch, or ONNX Runtime with the graphs of `hosl split ... --runtime "
        "onnx`; default: that of the run so far, else PyTorch where it is installed",
    )


def check_across(options: argparse.Namespace) -> None:
    """Refuse a runtime where both halves are on this machine.

    Raises:
        ConfigError: if --runtime stands without --to.
    """
    if options.runtime is not None and options.to is None:
        raise ConfigError(
            "--runtime is for a half whose other half is on a server; give --to too, or leave it out"
        )


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
