"""The `hosl` program: it finds the command, runs it, and turns errors into one line and an exit status.

0 done, 1 the work failed, 2 the request was wrong, 3 the run diverged, 130 interrupted. No heavy import before a
command needs it.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from hosl.errors import HoslError

_COMMANDS = {
    "train": "fine-tune a split model: hosl train CONFIG.yaml [--a.b value] | --resume RUN",
    "eval": "accuracy of a run's newest weights: hosl eval RUN [--split dev|test]",
    "export": "one Hugging Face checkpoint from a run: hosl export RUN OUT",
    "split": "cut a checkpoint into two folders: hosl split MODEL --cut K OUT",
    "serve": "train a server half with the devices that join: hosl serve OUT/server --listen HOST:PORT",
    "join": "train this device's half with a server: hosl join OUT/client --to LINE --config CONFIG.yaml",
    "audit": "what leaves the device, field by field: hosl audit OUT/client --config CONFIG.yaml",
    "plan": "does it fit, where to cut, what will it cost: hosl plan CONFIG.yaml | MODEL --device-memory 2GiB",
    "bench": "measure costs: hosl bench step | memory | plan | link --rtt 50ms --up 10mbit",
    "study": "many runs, resumable, as tables and pictures: hosl study STUDY.yaml [--dry-run]",
    "clients": "who may join: hosl clients ls | add NAME | revoke NAME",
    "runs": "what the server holds: hosl runs ls | drop NAME",
    "report": "one page of a run, or of many side by side: hosl report RUN... [-o FILE]",
}


def command() -> int:
    """The console script: `main` in a process of its own.

    Importing torch and transformers makes a million objects that stay. Python's collector, at its usual pace, would
    walk them again and again, and once more at the end: a second of every command.
    """
    gc.set_threshold(10_000)
    try:
        return main()
    finally:
        gc.freeze()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. With --json its result or its error stands on standard output."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<8}{text}" for name, text in _COMMANDS.items()]
        last = "hosl COMMAND --help tells more, hosl --version which hosl this is."
        sys.stdout.write("\n".join(["hosl COMMAND ...", "", *lines, "", last, ""]))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version  # 35 ms of every command

        sys.stdout.write(f"hosl {version('hosl')}\n")
        return 0
    if arguments[0] not in _COMMANDS:
        return _refuse(f"unknown command `{arguments[0]}`; allowed: {', '.join(_COMMANDS)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, our memory meter, greets on stderr
    run: Callable[[list[str]], int] = import_module(f"hosl.cli.{arguments[0]}").run
    try:
        return run(arguments[1:])
    except HoslError as error:
        if "--json" in arguments:
            failure = {"kind": type(error).__name__, "message": " ".join(str(error).split())}
            sys.stdout.write(json.dumps({"error": failure}) + "\n")
        return _refuse(str(error), status=error.exit_status)
    except KeyboardInterrupt:
        return _refuse(f"interrupted; go on with {_again(arguments)}", status=130)
    except OSError as error:
        return _refuse(f"{error.filename or 'the system'}: {error.strerror or error}", status=1)


def _again(arguments: list[str]) -> str:
    """The command that goes on with what was interrupted."""
    one_run = arguments[0] == "train" or any(text.partition("=")[0] == "--run" for text in arguments)
    return "`hosl train --resume RUN`" if one_run else f"the same `hosl {arguments[0]}`"


def _refuse(message: str, status: int = 2) -> int:
    sys.stderr.write(f"hosl: {' '.join(message.split())}\n")
    return status
