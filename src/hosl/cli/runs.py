"""`hosl runs ls | drop NAME`: the runs that a service keeps; on the server's machine."""

from pathlib import Path
from typing import Any

from hosl.cli.answers import answer, command_parser
from hosl.errors import FolderError
from hosl.system.checkpoint import checkpoint_steps


def run(arguments: list[str]) -> int:
    """List the runs or delete one; a running server hears of it at the next call. Returns the exit status.

    Raises:
        ConfigError: if the name is missing or unknown.
        FolderError: if there is no service in the folder.
    """
    parser = command_parser("runs", "The runs that the service keeps, in memory or on disk.")
    parser.add_argument("act", choices=("ls", "drop"))
    parser.add_argument(
        "name", nargs="?", help="of the run, for drop: its server half and checkpoints are deleted"
    )
    parser.add_argument("--service", default="runs/service", help="the folder given to `hosl serve`")
    options = parser.parse_args(arguments)
    folder = Path(options.service) / "runs"
    if not folder.parent.is_dir():
        raise FolderError(
            f"{folder.parent} is no service folder: it does not exist; give the right --service"
        )
    if (options.act == "ls") != (options.name is None):
        parser.error("ls takes no name, drop takes one")

    from hosl.service.sessions import drop_run, stored_runs

    if options.act == "drop":
        drop_run(folder, options.name)
        answer({"dropped": options.name}, as_json=options.json)
        return 0
    runs = [
        {
            "name": name,
            "clients": stored["clients"] if stored else ["handshake.json is damaged"],
            "saved_steps": _saved_steps(folder / name, stored),
            "max_steps": stored["training"]["maxSteps"] if stored else None,
        }
        for name, stored in stored_runs(folder)
    ]
    lines = {
        run["name"]: f"{', '.join(run['clients'])}; saved: {run['saved_steps']} of {run['max_steps']} steps"
        for run in runs
    }
    answer({"runs": runs} if options.json else lines, as_json=options.json)
    return 0


def _saved_steps(folder: Path, stored: dict[str, Any] | None) -> list[int] | dict[str, list[int]]:
    """The steps of which a run has checkpoints; where each client has adapters of its own, those of each."""
    from hosl.service.runs import CLIENTS

    if stored is None or not stored["training"].get("personalServer"):
        return checkpoint_steps(folder / "checkpoints")
    return {
        client: checkpoint_steps(folder / CLIENTS / client / "checkpoints") for client in stored["clients"]
    }
