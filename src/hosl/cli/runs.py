"""`hosl runs ls | show NAME | drop NAME`: the runs that a service keeps; on the server's machine."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hosl.cli.answers import answer, command_parser
from hosl.errors import ConfigError, FolderError

if TYPE_CHECKING:
    from hosl.service.operation.live_files import Running
    from hosl.service.operation.overview import StoredRun


def run(arguments: list[str]) -> int:
    """List the runs, show one or delete one; a running server is not asked, and hears of a deletion within seconds.

    Returns the exit status.

    Raises:
        ConfigError: if the name is missing or unknown, or nobody says yes to a deletion.
        FolderError: if there is no service in the folder.
    """
    parser = command_parser("runs", "The runs that the service keeps, in memory or on disk.")
    parser.add_argument("act", choices=("ls", "show", "drop"))
    parser.add_argument(
        "name", nargs="?", help="of the run, for show and drop; drop deletes its server half and checkpoints"
    )
    parser.add_argument("--service", default="runs/service", help="the folder given to `hosl serve`")
    parser.add_argument("--yes", action="store_true", help="drop without asking")
    options = parser.parse_args(arguments)
    service = Path(options.service)
    if not service.is_dir():
        raise FolderError(f"{service} is no service folder: it does not exist; give the right --service")
    if (options.act == "ls") != (options.name is None):
        parser.error("ls takes no name, show and drop take one")
    if options.yes and options.act != "drop":
        parser.error("--yes is for drop")

    from hosl.service.operation.live_files import read_running
    from hosl.service.operation.stored import check_run

    if options.act == "ls":
        return _list(service, read_running(service), as_json=options.json)
    check_run(service / "runs", options.name)
    if options.act == "drop":
        return _drop(service, options.name, sure=options.yes, as_json=options.json)
    return _show(service, options.name, read_running(service), as_json=options.json)


def _list(service: Path, server: "Running | None", *, as_json: bool) -> int:
    from hosl.service.operation.overview import all_stored
    from hosl.system.readable import readable_bytes

    runs = all_stored(service)
    if as_json:
        answer({"server": _server_facts(server), "runs": [_facts(run) for run in runs]}, as_json=True)
        return 0
    rows = [("run", "method", "model", "clients", "step", "loss", "disk", "heard")]
    for run in runs:
        size, heard = readable_bytes(run.disk_bytes), _ago(run.heard)
        if run.damage:
            rows.append((run.name, "handshake.json is damaged", "", "", "", "", size, heard))
            continue
        loss = "" if run.loss_nats is None else f"{run.loss_nats:.4f}"
        rows.append((
            run.name, run.method, f"{run.model.get('family', '?')}, cut {run.model.get('cut', 0)}",
            f"{run.present}/{run.expected}", f"{run.step}/{run.max_steps}", loss, size, heard,
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows if runs]
    sys.stdout.write("\n".join([_server_line(server), *lines, *([] if runs else ["no runs"])]) + "\n")
    return 0


def _show(service: Path, name: str, server: "Running | None", *, as_json: bool) -> int:
    from hosl.service.operation.overview import checkpoints_of, stored_run
    from hosl.system.readable import readable_bytes

    run, saved = stored_run(service, name), checkpoints_of(service, name)
    if run is None:
        raise ConfigError(f"run {name} was dropped meanwhile; `hosl runs ls` shows what is left")
    if as_json:
        answer(_facts(run) | {"checkpoints": saved, "server": _server_facts(server)}, as_json=True)
        return 0
    lines: dict[str, Any] = {"run": run.name, "server": _server_line(server).removeprefix("server: ")}
    if run.damage:
        lines["damaged"] = run.damage
    else:
        lines |= _said(run)
    lines["on disk"] = f"{readable_bytes(run.disk_bytes)} in {service / 'runs' / name}"
    for checkpoint in saved:
        state = "intact" if checkpoint["damage"] is None else f"DAMAGED: {checkpoint['damage']}"
        whose = f" of {checkpoint['client']}" if checkpoint["client"] else ""
        lines[f"checkpoint of step {checkpoint['step']}{whose}"] = (
            f"{readable_bytes(checkpoint['bytes'])}, written {_ago(checkpoint['written'])}, {state}"
        )
    if not saved:
        lines["checkpoints"] = "none yet"
    answer(lines, as_json=False)
    return 0


def _drop(service: Path, name: str, *, sure: bool, as_json: bool) -> int:
    from hosl.service.operation.overview import stored_run
    from hosl.service.operation.stored import drop_run
    from hosl.system.readable import readable_bytes

    run = stored_run(service, name)
    if not sure and run is not None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"dropping run {name} deletes its server half and checkpoints for good, and nobody is here to be "
                "asked; say --yes"
            )
        here = f"; {run.present} of its clients take part now, and will be refused" if run.present else ""
        sys.stderr.write(
            f"run {name}: {run.step} of {run.max_steps} steps, {readable_bytes(run.disk_bytes)}, last heard "
            f"{_ago(run.heard)}{here}. Delete it for good? [y/N] "
        )
        sys.stderr.flush()
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise ConfigError(f"run {name} was not dropped: nobody said yes")
    drop_run(service / "runs", name)
    facts = {"dropped": name, "freed_bytes": run.disk_bytes if run is not None else 0}
    answer(
        facts if as_json else {"dropped": f"{name}, {readable_bytes(facts['freed_bytes'])}"}, as_json=as_json
    )
    return 0


def _said(run: "StoredRun") -> dict[str, Any]:
    """The lines of one run whose handshake is whole."""
    lines: dict[str, Any] = {
        "method": run.method,
        "model": ", ".join(f"{key} {str(value)[:16]}" for key, value in run.model.items()),
        "settings": ", ".join(_flat(run.training)),
        "step": f"{run.step} of {run.max_steps}",
        "loss": "not known" if run.loss_nats is None else f"{run.loss_nats:.4f} nats",
        "in memory": "yes" if run.in_memory else "no",
        "clients": f"{run.present} of {run.expected} present",
    }
    for seat in run.seats:
        here = "present" if seat.present else "away"
        lines[f"client {seat.name}"] = f"step {seat.step}, {here}, last heard {_ago(seat.heard)}"
    for gone, heir in run.heirs.items():
        lines[f"seat of {gone}"] = f"is {heir}'s now"
    return lines


def _flat(settings: dict[str, Any], within: str = "") -> list[str]:
    """The settings of a run in words, `optimiser.name SGD`, but the method and what only a program compares."""
    words = list[str]()
    for key, value in settings.items():
        if isinstance(value, dict):
            words += _flat(value, f"{key}.")
        elif key not in ("method", "labelsDigest"):
            words.append(f"{within}{key} {', '.join(value) if isinstance(value, list) else value}")
    return words


def _facts(run: "StoredRun") -> dict[str, Any]:
    facts = asdict(run)
    facts["clients"] = [run.damage] if run.damage else [seat.name for seat in run.seats]
    return facts | {"present": run.present, "finished": bool(run.max_steps) and run.step >= run.max_steps}


def _server_facts(server: "Running | None") -> dict[str, Any] | None:
    if server is None:
        return None
    return {
        "alive": server.alive, "pid": server.pid, "started": server.started, "written": server.written,
        "runs": server.runs,
    }  # fmt: skip


def _server_line(server: "Running | None") -> str:
    if server is None:
        return "server: none runs in this folder"
    if not server.alive:
        return f"server: not heard for {_ago(server.written).removesuffix(' ago')}: it was killed, or cannot write here"
    held = ", ".join(server.runs) or "no run"
    return f"server: started {_ago(server.started)}, process {server.pid}; in memory: {held}"


def _ago(moment: float | None) -> str:
    from hosl.system.readable import readable_span

    return "not known" if moment is None else f"{readable_span(time.time() - moment)} ago"
