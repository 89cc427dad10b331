"""A thousand devices on one server, on paper: bytes, seconds and the bottleneck of a round, from the planner's counts.

    python research/scale.py [--devices 1000 --directions 10 --link 10 --device 0.1 --gpus 8 --gpu 400]

The work and the bytes of a step are counted by running the parties' own code without data (`hosl.planner.costs`), at
16 rows of 64 tokens, cut 5. What the machines make of it are round numbers, given as arguments: a device's and a GPU's
arithmetic, the link. The CPU seconds of the service for each GiB and each call are those of `hosl bench service`.
"""

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hosl.config import ClientsConfig, Config, ModelConfig, WireConfig, ZOConfig
from hosl.planner.costs import client_cost_at, server_cost
from hosl.planner.dry_run import Work
from hosl.planner.model_shape import ModelShape, model_shape

CUT, ROWS, TOKENS = 5, 16, 64
LLAMA_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
WAYS = {
    "frozen": ("frozen", "none"), "hosl": ("hosl", "none"), "hosl, int8": ("hosl", "int8"),
    "hosl-gradient": ("hosl-gradient", "none"), "hosl-node": ("hosl-node", "none"),
    "hosl-residual": ("hosl-residual", "none"), "fo-recompute": ("fo-recompute", "none"),
}  # fmt: skip


@dataclass(frozen=True)
class Machines:
    """The machines on paper."""

    devices: int
    directions: int
    link_bits_s: float
    device_flop_s: float
    server_flop_s: float
    loop_s_per_gib: float
    all_s_per_gib: float
    s_per_call: float


def flop(work: Work) -> float:
    """Multiplications and additions of all products and attentions."""
    products = sum(2.0 * p.batch * p.rows * p.inner * p.columns * n for p, n in work.products.items())
    attention = sum(
        4.0 * a.rows * a.heads * a.queries * a.keys * a.width * n for a, n in work.attention.items()
    )
    return products + attention


def line_of(way: str, shape: ModelShape, machines: Machines) -> str:
    """One row of the table: a round of all devices with `way`."""
    method, compression = WAYS[way]
    shared = "personal" if method not in ("hosl", "hosl-gradient") else "shared"
    config = Config(
        method=method, model=ModelConfig(cut=CUT), zo=ZOConfig(directions=machines.directions),
        wire=WireConfig(compression=compression),
        clients=ClientsConfig(
            count=machines.devices, halves=shared, schedule="synchronous",
            directions="common" if shared == "shared" else "own",
        ),
    )  # fmt: skip
    client, traffic = client_cost_at(config, shape, ROWS, TOKENS)
    server = server_cost(config, shape, ROWS, TOKENS)
    wire_s = (traffic.bytes_up + traffic.bytes_down) * 8 / machines.link_bits_s
    # an update along random directions is a pass over the trained numbers for each, as cheap as memory allows
    device_s = (flop(client.work) + 2 * (client.formed + client.updated)) / machines.device_flop_s
    round_s = wire_s + device_s
    all_gib = machines.devices * (traffic.bytes_up + traffic.bytes_down) / 2**30
    compute_s = machines.devices * flop(server.work) / machines.server_flop_s
    calls = machines.devices * (traffic.round_trips + 1)
    loop_s = all_gib * machines.loop_s_per_gib + calls * machines.s_per_call
    cpu_s = all_gib * machines.all_s_per_gib + calls * machines.s_per_call
    server_s = {"server's GPUs": compute_s, "event loop": loop_s}
    busiest = max(server_s, key=lambda name: server_s[name])
    # a device sends and computes in turn; the server works meanwhile, and is waited for only if it takes longer
    longest = busiest if server_s[busiest] > round_s else "link" if wire_s > device_s else "device"
    most = math.floor(machines.devices * round_s / max(compute_s, loop_s))
    cells = (
        way, f"{traffic.bytes_up / 2**20:.0f} / {traffic.bytes_down / 2**20:.0f}", f"{wire_s:.0f}", f"{device_s:.0f}",
        f"{all_gib / round_s:.2f}", f"{compute_s:.0f}", f"{loop_s:.0f} / {cpu_s:.0f}", longest, f"{most:,}",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def shapes() -> dict[str, ModelShape]:
    """OPT-1.3B and a 7B Llama, by their configs alone."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA_7B), encoding="utf-8")
        return {"OPT-1.3B": model_shape("opt-1.3b"), "Llama, 7B": model_shape(folder)}


def main() -> None:
    """Print one table per model."""
    words = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    words.add_argument("--devices", type=int, default=1000)
    words.add_argument("--directions", type=int, default=10, help="Q, common to all devices")
    words.add_argument("--link", type=float, default=10.0, help="Mbit/s of a device, up and down in turn")
    words.add_argument("--device", type=float, default=0.1, help="TFLOP/s that a device reaches, float32")
    words.add_argument("--gpus", type=int, default=8, help="GPUs of the server")
    words.add_argument("--gpu", type=float, default=400.0, help="TFLOP/s that a GPU reaches, bfloat16")
    words.add_argument("--loop", type=float, default=0.8, help="CPU seconds of the event loop for each GiB")
    words.add_argument(
        "--all", type=float, default=2.0, help="CPU seconds of the service for each GiB, TLS included"
    )
    words.add_argument(
        "--call", type=float, default=0.0025, help="CPU seconds of the event loop for each call"
    )
    given = words.parse_args()
    machines = Machines(
        given.devices, given.directions, given.link * 1e6, given.device * 1e12, given.gpus * given.gpu * 1e12,
        given.loop, given.all, given.call,
    )  # fmt: skip
    for name, shape in shapes().items():
        print(
            f"{name}, cut {CUT}, {ROWS} x {TOKENS} tokens, {given.devices:,} devices, Q = {given.directions}\n"
        )
        print(
            "| method | MiB up / down | link, s | device, s | GiB/s in | GPUs, s | loop / CPU, s | decided by | "
            "devices |"
        )
        print("|---|---|---|---|---|---|---|---|---|")
        for way in WAYS:
            print(line_of(way, shape, machines), flush=True)
        print()


if __name__ == "__main__":
    main()
