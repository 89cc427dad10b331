"""`hosl bench link`: steps across an emulated link, and their time by client, wire and server."""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from hosl.bench.isolated_client import client_alone
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.bench.server_process import served_half
from hosl.config import Config
from hosl.methods.step import method_round
from hosl.methods.synthetic import fixed_batch
from hosl.network import torch_runtime
from hosl.network.handshake import model_message, training_message
from hosl.parties.metered import Meter, metered
from hosl.parties.remote.server import RemoteServer
from hosl.split.reading.half_json import half_facts
from hosl.system.allocator import return_freed_memory
from hosl.system.machine import process_peak_bytes
from hosl.transport.channel import Channel
from hosl.transport.join_line import JoinLine
from hosl.transport.link import Link, LinkSpec
from hosl.wire import hosl_pb2 as pb
from hosl.wire.protocol import PROTOCOL
from hosl.wire.tensors import packed_bytes


def bench_link(config: Config, sizes: BenchSizes, spec: LinkSpec, steps: int) -> dict[str, Any]:
    """Run a server, a link and this process as the client; returns medians over the measured steps.

    Args:
        config: the run's settings; its cut is that of `sizes`.
        sizes: the model and the batch.
        spec: the link to emulate.
        steps: measured steps, after one that warms up.

    Raises:
        FailureError: if the model cannot be made, or the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        halves = random_halves(sizes, Path(name))
        with (
            served_half(halves) as served,
            Link(("127.0.0.1", served.line.port), spec) as link,
        ):
            through = JoinLine("127.0.0.1", link.address[1], served.line.token, served.line.fingerprint)
            figures = _measure(config, sizes, steps, halves / "client", through)
    return {
        **sizes.facts(), "method": config.method, "directions": config.zo.directions,
        "compression": config.wire.compression, "steps": steps, "rtt_s": spec.rtt_s,
        "up_bits_per_s": spec.up_bits_per_s, "down_bits_per_s": spec.down_bits_per_s, **figures,
    }  # fmt: skip


def _measure(config: Config, sizes: BenchSizes, steps: int, half: Path, through: JoinLine) -> dict[str, Any]:
    return_freed_memory()  # as `hosl join` does
    facts = half_facts(half, "client")
    config = msgspec.structs.replace(config, max_steps=steps + 1)
    client = torch_runtime.open_client(config, half)

    def greeting(current: int) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocol=PROTOCOL, run="bench", model=model_message(facts, config), training=training_message(config),
            restorable=[0], current=current,
        )  # fmt: skip

    batch, meter, measured = fixed_batch(client, sizes.rows, sizes.tokens), Meter(), []
    alone = client_alone(config, half, sizes.rows, sizes.tokens, steps + 1)
    alone_mib = alone["process_peak_bytes"] / 2**20
    channel = Channel(through)
    remote = RemoteServer(
        channel, greeting, torch_runtime, compression=config.wire.compression, seed=config.seed
    )
    remote.hello()
    for step in range(1, steps + 2):
        bytes_before, begin = (channel.bytes_up, channel.bytes_down), time.perf_counter()
        method_round(config, metered(client, meter), remote, batch, step)
        step_s = time.perf_counter() - begin
        remote.at(step)
        server_s, client_s = remote.meter.take().seconds, meter.take().seconds
        wire_s, remote.wire_s = remote.wire_s, 0.0
        up, down = channel.bytes_up - bytes_before[0], channel.bytes_down - bytes_before[1]
        measured.append((step_s, client_s, server_s, wire_s, up, down))
    remote.close()
    step_s, client_s, server_s, wire_s, up, down = map(median, zip(*measured[1:], strict=True))
    shape = (sizes.rows, sizes.tokens, client.half.config.get_text_config().hidden_size)
    ideal = config.method_row.uploads(config.zo.directions) * packed_bytes(
        shape, config.model.dtype, config.wire.compression
    )
    return {
        "step_s": round(step_s, 4), "client_s": round(client_s, 4), "server_s": round(server_s, 4),
        "wire_s": round(wire_s, 4), "wire_share": round(wire_s / step_s, 4),
        "bytes_up": int(up), "bytes_down": int(down), "activation_bytes": ideal,
        "bytes_up_over_activations": round(up / ideal, 5),
        "process_peak_mib": round(process_peak_bytes() / 2**20, 1), "alone_peak_mib": round(alone_mib, 1),
        "network_mib": round(process_peak_bytes() / 2**20 - alone_mib, 1),
    }  # fmt: skip
