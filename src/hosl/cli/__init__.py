"""The `hosl` program: it finds the command, runs it, and turns errors into one line and an exit status.

0 done, 1 the work failed, 2 the request was wrong, 3 the run diverged, 130 interrupted. No heavy import before a
command needs it.
"""

import gc
import io
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hosl.errors import ConfigError, HoslError

_COMMANDS = {
    "train": "fine-tune a split model: hosl train CONFIG.yaml [--a.b value] | --resume RUN",
    "eval": "accuracy of a run's newest weights: hosl eval RUN [--split dev|test]",
    "generate": "what a tuned model says: hosl generate RUN --prompt TEXT [--before]",
    "predict": "labels of new rows: hosl predict RUN ROWS -o OUT.jsonl",
    "export": "one Hugging Face checkpoint from a run: hosl export RUN OUT",
    "split": "cut a checkpoint into two folders: hosl split MODEL --cut K OUT",
    "serve": "train a server half with the devices that join: hosl serve OUT/server --listen HOST:PORT",
    "join": "train this device's half with a server: hosl join OUT/client --to LINE --config CONFIG.yaml",
    "merge": "one checkpoint out of the two halves: hosl merge RUN --to LINE -o OUT | SERVICE --run NAME -o OUT",
    "audit": "what leaves the device, field by field: hosl audit OUT/client --config CONFIG.yaml",
    "plan": "does it fit, where to cut, what will it cost: hosl plan CONFIG.yaml | MODEL --device-memory 2GiB",
    "bench": "measure costs: hosl bench step | memory | plan | link --rtt 50ms --up 10mbit",
    "study": "many runs, resumable, as tables and pictures: hosl study STUDY.yaml [--dry-run]",
    "clients": "who may join: hosl clients ls | add NAME | revoke NAME",
    "runs": "what the server holds: hosl runs ls | show NAME | drop NAME",
    "report": "one page of a run, or of many side by side: hosl report RUN... [-o FILE]",
}
_ROOMS = {"generate": "use.", "predict": "use.", "merge": "use."}
"""The room of a command's module below this one, where it has one."""
_EXTRAS = {
    "torch": "torch", "transformers": "torch", "peft": "lora", "pyarrow": "data", "matplotlib": "report",
    "jinja2": "report", "cryptography": "serve", "prometheus_client": "serve", "gguf": "gguf",
    "onnxruntime": "edge", "onnx": "onnx-export", "onnxscript": "onnx-export",
    "opentelemetry": "otel",
}  # fmt: skip
"""Module -> the extra of this package that brings it."""
_TOKEN = re.compile(
    r"[\w-]{43}\.[\w-]{43}|(?<!fingerprint )(?<![\w-])(?=[\w-]*[A-Z])(?=[\w-]*[a-z])[\w-]{43}(?![\w-])"
)
"""A token and a fingerprint without their join line, or a token alone."""
_BEHIND_ADDRESS = re.compile(r"(hosl://[^\s#]*#)(?!token\.fingerprint)\S*[^\s;,.:]", re.IGNORECASE)
"""All of a join line that may be the token, or a part of it."""
_AT_HOME = re.compile(r"^((?:--[\w.-]+=)?@?)(~[^/]*)(?=/|$)")
"""A path at home where a shell leaves the ~ as it is: --service=~/runs, @~/line."""


def command() -> int:
    """The console script: `main` in a process of its own.

    Importing torch and transformers makes a million objects that stay. Python's collector, at its usual pace, would
    walk them again and again, and once more at the end: a second of every command.
    """
    gc.set_threshold(10_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without Unicode gets escapes, not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. With --json its result or its error stands on standard output."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<9}{text}" for name, text in _COMMANDS.items()]
        last = "hosl COMMAND --help tells more, hosl --version which hosl this is."
        sys.stdout.write("\n".join(["hosl COMMAND ...", "", *lines, "", last, ""]))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version  # 35 ms of every command

        sys.stdout.write(f"hosl {version('hosl')}\n")
        return 0
    if arguments[0] not in _COMMANDS:
        return _refuse(f"unknown command `{arguments[0]}`; allowed: {', '.join(_COMMANDS)}")
    for argument in arguments:
        if not argument.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in argument):
            return _refuse(f"{argument!r} is not text in UTF-8, so no file of a run could hold it; rename it")
    arguments = [_AT_HOME.sub(lambda found: found[1] + os.path.expanduser(found[2]), a) for a in arguments]
    # torch's profiler, our memory meter, greets on stderr, and warns of what was allocated before it
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    run: Callable[[list[str]], int] = import_module(
        f"hosl.cli.{_ROOMS.get(arguments[0], '')}{arguments[0]}"
    ).run
    try:
        return run(arguments[1:])
    except HoslError as error:
        return _failed(error, arguments)
    except ModuleNotFoundError as cause:
        missing = (cause.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        return _failed(
            ConfigError(
                f"hosl {arguments[0]} needs {missing}, which is not installed here: "
                f"`pip install 'hosl[{_EXTRAS[missing]}]'`"
            ),
            arguments,
        )
    except KeyboardInterrupt:
        return _refuse(f"interrupted; go on with {_again(arguments)}", status=130)
    except OSError as error:
        return _refuse(f"{error.filename or 'the system'}: {error.strerror or error}", status=1)


def _failed(error: HoslError, arguments: list[str]) -> int:
    if "--json" in arguments:
        failure = {"kind": type(error).__name__, "message": _one_line(str(error))}
        sys.stdout.write(json.dumps({"error": failure}) + "\n")
    return _refuse(str(error), status=error.exit_status)


def _again(arguments: list[str]) -> str:
    """The command that goes on with what was interrupted."""
    named = any(text.partition("=")[0] == "--run" for text in arguments)
    one_run = arguments[0] == "train" or (named and arguments[0] != "merge")
    return "`hosl train --resume RUN`" if one_run else f"the same `hosl {arguments[0]}`"


def _refuse(message: str, status: int = 2) -> int:
    sys.stderr.write(f"hosl: {_one_line(message)}\n")
    return status


def _one_line(message: str) -> str:
    """A message for a terminal or a log, in one line; what may be the token of a join line is left out."""
    return _BEHIND_ADDRESS.sub(r"\1...", _TOKEN.sub("...", " ".join(message.split())))
