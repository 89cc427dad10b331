"""`hosl clients ls | add NAME | revoke NAME`: who may join. On the server's machine."""

import json
from pathlib import Path

from hosl.cli.answers import answer, verb_parser
from hosl.errors import FolderError


def run(words: list[str]) -> int:
    """List, enrol or revoke; a running server hears of it with the next message."""
    parser = verb_parser("clients", "Who may join the service.")
    parser.add_argument("act", choices=("ls", "add", "revoke"))
    parser.add_argument("name", nargs="?", help="of the client, for add and revoke")
    parser.add_argument("--service", default="runs/service", help="the folder given to `hosl serve`")
    known = parser.parse_args(words)
    folder = Path(known.service)
    if not folder.is_dir():
        raise FolderError(
            f"{folder} is no service folder: it does not exist; start `hosl serve` first, or give --service"
        )
    if (known.act == "ls") != (known.name is None):
        parser.error("ls takes no name, add and revoke take one")

    from hosl.service.access import Access
    from hosl.transport.join_line import JoinLine

    access = Access(folder)
    if known.act == "ls":
        clients = access.names()
        if known.json:
            answer({"clients": clients}, as_json=True)
        else:
            answer(
                {
                    c["name"]: f"enrolled {c['enrolled']}{', revoked' if c['revoked'] else ''}"
                    for c in clients
                },
                as_json=False,
            )
        return 0
    if known.act == "revoke":
        access.revoke(known.name)
        answer({"revoked": known.name}, as_json=known.json)
        return 0
    if not (folder / "address.json").is_file():
        raise FolderError(f"{folder} has no address.json yet: start `hosl serve` once, then add clients")
    at = json.loads((folder / "address.json").read_text(encoding="utf-8"))
    host, _, port = at["address"].rpartition(":")
    line = JoinLine(host, int(port), access.enrol(known.name), at["fingerprint"])
    answer({"name": known.name, "join_line": str(line)}, as_json=known.json)
    return 0
