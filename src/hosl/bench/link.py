"""`hosl bench link`: steps across an emulated link, and where their time goes: client, wire, server."""

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from hosl.bench.isolated_client import client_alone
from hosl.bench.random_halves import random_halves
from hosl.config import Config
from hosl.errors import FailureError
from hosl.methods.step import method_round
from hosl.methods.synthetic import fixed_batch
from hosl.network import torch_runtime as torch_device
from hosl.network.handshake import model_message, training_message
from hosl.parties.metered import Meter, Metered
from hosl.parties.remote.server import RemoteServer
from hosl.split.folder_facts import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.machine import process_peak_bytes
from hosl.transport.channel import Channel
from hosl.transport.join_line import JoinLine
from hosl.transport.link import Link, LinkSpec
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import packed_bytes


@dataclass(frozen=True, kw_only=True)
class LinkBench:
    """What is measured."""

    shape: str = "opt-125m"
    """Random weights in this shape (`hosl.split.shapes`)."""
    cut: int = 5
    rows: int = 16
    tokens: int = 64
    steps: int = 5
    """Measured, after one that warms up."""
    link: LinkSpec = field(default_factory=LinkSpec)


def bench_link(config: Config, bench: LinkBench) -> dict[str, Any]:
    """Run a server, a link and this process as the client; medians over the measured steps.

    Raises:
        FailureError: if the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        folder = Path(name)
        halves = random_halves(bench.shape, bench.cut, folder)
        server, line = _start_server(halves)
        try:
            with Link(("127.0.0.1", line.port), bench.link) as link:
                through = JoinLine("127.0.0.1", link.address[1], line.token, line.fingerprint)
                return _measure(config, bench, halves, through)
        finally:
            server.terminate()
            server.wait()


def _start_server(halves: Path) -> tuple["subprocess.Popen[str]", JoinLine]:
    program = "import sys; from hosl.cli import main; sys.exit(main())"
    words = ["serve", str(halves / "server"), "--listen", "127.0.0.1:0"]
    server = subprocess.Popen(
        [sys.executable, "-c", program, *words, "--service", str(halves / "service")],
        stdout=subprocess.PIPE,
        stderr=(halves / "server.log").open("wb"),
        text=True,
        env=os.environ.copy(),
    )
    assert server.stdout is not None, "it was asked for"
    for text in server.stdout:
        if text.startswith("hosl://"):
            return server, JoinLine.parse(text)
    log = (halves / "server.log").read_text(errors="replace")[-500:]
    raise FailureError(f"the server of the benchmark did not start: {log}")


def _measure(config: Config, bench: LinkBench, halves: Path, through: JoinLine) -> dict[str, Any]:
    return_freed_memory()  # as `hosl join` does
    half = halves / "client"
    facts = half_facts(half, "client")
    config = msgspec.structs.replace(config, max_steps=bench.steps + 1)
    client = torch_device.open_client(config, half)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=1, run="bench", model=model_message(facts, config), training=training_message(config),
            restorable=[0], current=current,
        )  # fmt: skip

    batch, meter, lines = fixed_batch(client, bench.rows, bench.tokens), Meter(), []
    alone = client_alone(config, half, bench.rows, bench.tokens, bench.steps + 1)
    alone_mib = alone["process_peak_bytes"] / 2**20
    channel = Channel(through)
    remote = RemoteServer(channel, greeting, _Arrays(), compression=config.wire.compression, seed=config.seed)
    remote.hello()
    for step in range(1, bench.steps + 2):
        bytes_before, begin = (channel.bytes_up, channel.bytes_down), time.perf_counter()
        method_round(config, Metered(client, meter), remote, batch, step)
        step_s = time.perf_counter() - begin
        remote.at(step)
        server_s, client_s = remote.meter.take().seconds, meter.take().seconds
        wire_s, remote.wire_s = remote.wire_s, 0.0
        up, down = channel.bytes_up - bytes_before[0], channel.bytes_down - bytes_before[1]
        lines.append((step_s, client_s, server_s, wire_s, up, down))
    remote.close()
    middle = [median(values) for values in zip(*lines[1:], strict=True)]
    shape = (bench.rows, bench.tokens, client.half.config.get_text_config().hidden_size)
    uploads = {"hosl": 2 * config.zo.directions + 1, "zo-zo": 2 * config.zo.directions}.get(config.method, 1)
    ideal = uploads * packed_bytes(shape, config.model.dtype, config.wire.compression)
    return {
        "shape": bench.shape, "cut": bench.cut, "rows": bench.rows, "tokens": bench.tokens, "method": config.method,
        "directions": config.zo.directions, "compression": config.wire.compression, "steps": bench.steps,
        "rtt_s": bench.link.rtt_s, "up_bits_per_s": bench.link.up_bits_per_s,
        "down_bits_per_s": bench.link.down_bits_per_s,
        "step_s": round(middle[0], 4), "client_s": round(middle[1], 4), "server_s": round(middle[2], 4),
        "wire_s": round(middle[3], 4), "wire_share": round(middle[3] / middle[0], 4),
        "bytes_up": int(middle[4]), "bytes_down": int(middle[5]), "activation_bytes": ideal,
        "bytes_up_over_activations": round(middle[4] / ideal, 5),
        "process_peak_mib": round(process_peak_bytes() / 2**20, 1), "alone_peak_mib": round(alone_mib, 1),
        "network_mib": round(process_peak_bytes() / 2**20 - alone_mib, 1),
    }  # fmt: skip


class _Arrays:
    to_wire = staticmethod(torch_device.to_wire)
    from_wire = staticmethod(torch_device.from_wire)
