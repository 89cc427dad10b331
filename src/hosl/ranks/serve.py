"""`hosl serve --ranks`: the launcher, rank 0 with the service, or one of the others, by this process's environment."""

import dataclasses
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.core.layout import Layout
from hosl.errors import ConfigError
from hosl.network.serve import ServeOptions, parse_address, serve
from hosl.ranks.launcher import Launcher, end_with_launcher, own_command, with_port
from hosl.ranks.place import Place, place_of_process
from hosl.split.reading.half_json import half_facts
from hosl.transport.join_line import address_of


def serve_ranks(options: ServeOptions, layout: Layout) -> int:
    """Serve with several ranks; the exit status.

    Without the environment of a rank, the ranks are started on this machine and this process watches over them.

    Raises:
        RequestError: as of `serve`; if labels are at the client, or the device is one of several GPUs.
    """
    if half_facts(options.half, "server").get("labels") == "client":
        raise ConfigError(
            f"{options.half} was split with labels at the client: its blocks wait for the client's gradient between "
            "their passes, which one process does; serve it without --ranks, or split with --labels-at server"
        )
    kind = options.device.partition(":")[0]
    if kind not in ("cpu", "cuda") or options.device != kind:
        raise ConfigError(
            f"--device {options.device}: the ranks of a machine have one device each; give cpu or cuda"
        )
    place = place_of_process(layout.ranks)
    if place is None:
        host, port = parse_address(options.listen)
        command = own_command(address_of(host, with_port(host, port)))
        return Launcher(command, layout.ranks, say=options.say).run()
    serve_rank(options, layout, place)
    return 0


def serve_rank(options: ServeOptions, layout: Layout, place: Place) -> None:
    """Be one rank until the service ends."""
    if place.rank:  # rank 0 says when: it saves with the others first
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    if place.store is not None:
        end_with_launcher()
    device = options.device if options.device == "cpu" else f"{options.device}:{place.local_rank}"

    import torch
    import torch.distributed as dist

    from hosl.methods.torch_parties import check_device
    from hosl.ranks.group import Group, end_broken
    from hosl.ranks.hosting import RankedHosted, Ranks

    check_device(device, "--device")
    try:
        group = Group(place, layout, torch.device(device))
    except Exception as cause:  # such as a rank that died before it came
        end_broken(place, cause)
    ranks = Ranks(group, Path(options.half))
    if place.rank:
        ranks.follow()
    else:

        def host(config: Config, new_weights: Sequence[str], synchronous: bool) -> Any:
            return RankedHosted(ranks, config, new_weights, synchronous=synchronous)

        options.say(f"{layout.described}; frozen weights under adapters are whole on each")
        try:
            serve(dataclasses.replace(options, device=device), host)
        finally:
            ranks.stop()
    with warnings.catch_warnings():
        dist.destroy_process_group()
