"""`hosl clients ls | add NAME | revoke NAME`: the clients that may join; on the server's machine."""

import json
from pathlib import Path

from hosl.cli.answers import answer, command_parser
from hosl.errors import FolderError


def run(arguments: list[str]) -> int:
    """List, enrol or revoke; it holds for a running server from the next message on. Returns the exit status.

    Raises:
        ConfigError: if the name is missing, taken or unknown.
        FolderError: if there is no service in the folder.
    """
    parser = command_parser("clients", "Who may join the service.")
    parser.add_argument("act", choices=("ls", "add", "revoke"))
    parser.add_argument("name", nargs="?", help="of the client, for add and revoke")
    parser.add_argument("--service", default="runs/service", help="the folder given to `hosl serve`")
    options = parser.parse_args(arguments)
    folder = Path(options.service)
    if not folder.is_dir():
        raise FolderError(
            f"{folder} is no service folder: it does not exist; start `hosl serve` first, or give --service"
        )
    if (options.act == "ls") != (options.name is None):
        parser.error("ls takes no name, add and revoke take one")

    from hosl.service.access import Access
    from hosl.transport.join_line import JoinLine, check_public

    access = Access(folder)
    if options.act == "ls":
        clients = access.names()
        lines = {c["name"]: f"enrolled {c['enrolled']}{', revoked' if c['revoked'] else ''}" for c in clients}
        answer({"clients": clients} if options.json else lines, as_json=options.json)
        return 0
    if options.act == "revoke":
        access.revoke(options.name)
        answer({"revoked": options.name}, as_json=options.json)
        return 0
    if not (folder / "address.json").is_file():
        raise FolderError(f"{folder} has no address.json yet: start `hosl serve` once, then add clients")
    server = json.loads((folder / "address.json").read_text(encoding="utf-8"))
    host, _, port = server["address"].rpartition(":")
    address = host.strip("[]"), int(port)
    check_public(*address)  # before the token is made
    line = JoinLine(*address, access.enrol(options.name), server["fingerprint"])
    answer({"name": options.name, "join_line": str(line)}, as_json=options.json)
    return 0
