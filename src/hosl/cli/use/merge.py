"""`hosl merge RUN --to LINE -o OUT` on the device, `hosl merge SERVICE --run NAME -o OUT` on the server."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser, add_connection, answer, command_parser, connection
from hosl.cli.use.gguf import add_gguf, gguf_written
from hosl.errors import ConfigError, FolderError


def run(arguments: list[str]) -> int:
    """Write OUT, which must not exist or be empty: one Hugging Face checkpoint of both halves. Returns the exit status.

    Raises:
        FolderError: if RUN is no run of `hosl join` and no service, or OUT is taken.
        RequestError: if an argument cannot be used, or the server keeps its half.
        FailureError: if a half is damaged, or the server goes away for good.
    """
    parser = command_parser(
        "merge",
        "One checkpoint that plain transformers loads, out of the two halves of a run on two machines.",
    )
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    source, on_server = Path(options.source), _is_servers(Path(options.source))
    for name, of_server in _PLACES.items():
        if getattr(options, name) not in (None, False) and of_server != on_server:
            where = "on the server, with its service" if of_server else "on the device, with its run"
            raise ConfigError(
                f"hosl merge: --{name.replace('_', '-')} is for `hosl merge` {where}; leave it out"
            )

    result = _on_server(source, options) if on_server else _on_device(source, options)
    if options.gguf is not None:
        result |= gguf_written(Path(options.out), Path(options.gguf), options.gguf_dtype)
    answer(result, as_json=options.json)
    return 0


_PLACES = {
    "to": False, "authority": False, "certificate": False, "key": False, "plaintext": False,
    "run": True, "service": True, "client": True, "labels": True,
}  # fmt: skip
"""The options for one side alone -> whether that side is the server."""


def _add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        help="on the device: a run of `hosl join`; on the server: OUT/server, or the service's folder",
    )
    parser.add_argument(
        "-o", "--out", required=True, help="a folder to make; adapters also go to OUT/adapter"
    )
    add_connection(parser, required=False)
    parser.add_argument("--run", metavar="NAME", help="on the server: the run, as `hosl runs ls` shows it")
    parser.add_argument("--service", help="on the server, with OUT/server: default runs/service")
    parser.add_argument(
        "--client", metavar="NAME", help="on the server: whose half, where several gave theirs"
    )
    parser.add_argument(
        "--labels", metavar="A,B,...", help="on the server: the names of the classes, which do not cross"
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the model that was split; on the server this or --client-half"
    )
    parser.add_argument("--client-half", help="OUT/client of `hosl split`; on the device: if it was moved")
    parser.add_argument(
        "--tie",
        choices=("embedding", "head"),
        help="of a tied model, the copy that stands for both; default: two",
    )
    add_gguf(parser)


def _is_servers(source: Path) -> bool:
    """Whether SOURCE is the server's: a service's folder, or a server half."""
    if (source / "record.json").is_file():
        return False
    if (source / "half.json").is_file() or (source / "address.json").is_file():
        return True
    raise FolderError(
        f"{source} is neither a run of `hosl join` nor a service's folder nor OUT/server of `hosl split`"
    )


def _on_device(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    if options.to is None:
        raise ConfigError("hosl merge RUN needs --to, the join line of the server that has the other half")
    line, proof = connection(options)

    from hosl.network.merge import merge_on_device

    return merge_on_device(run, line, _merge_options(options), _say, proof=proof)


def _on_server(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    if options.run is None:
        raise ConfigError("hosl merge needs --run on the server; `hosl runs ls` shows the names")
    service, half = Path(options.service or "runs/service"), source
    if not (source / "half.json").is_file():
        service, half = source, _served_half(source)

    from hosl.network.merge import merge_on_server

    labels = None if options.labels is None else options.labels.split(",")
    return merge_on_server(
        service, half, options.run, _merge_options(options), _say, client=options.client, labels=labels
    )


def _served_half(service: Path) -> Path:
    """The half that the service served last."""
    try:
        return Path(json.loads((service / "address.json").read_text(encoding="utf-8"))["half"])
    except (OSError, ValueError, LookupError, TypeError) as cause:
        raise FolderError(
            f"{service} does not say which half it served; give OUT/server in its place, and --service {service}"
        ) from cause


def _merge_options(options: argparse.Namespace) -> Any:
    from hosl.network.merge import MergeOptions

    return MergeOptions(
        out=Path(options.out), tie=options.tie, base=options.base,
        client_half=Path(options.client_half) if options.client_half else None,
        gguf=Path(options.gguf) if options.gguf else None,
    )  # fmt: skip


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
