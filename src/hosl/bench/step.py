"""`hosl bench step`: the cost of a client's step, for every method, against plain forward passes of the same half.

All methods are measured in one run, one after the other and then again (interleaved), because absolute times are noisy:
read the ratios. A synthetic server replies at once, so that no figure holds time or memory of a server or a network.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hosl.bench.isolated_client import client_alone
from hosl.bench.memory import memory_row
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.config import Config
from hosl.core.directions import direction_seed, drawn, low_rank_factors
from hosl.core.targets import Batch
from hosl.methods.step import method_round
from hosl.methods.synthetic import NoServer, fixed_batch
from hosl.methods.torch_parties import DTYPES, make_client
from hosl.methods.variants import FORWARD, Variant
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.metered import Meter, metered
from hosl.split import load_half

STEPS_OF_A_RUN = 1500
"""The steps for which hours are projected."""

PHASES = {
    "forward_s": ("forward", "forward_keeping_inputs", "forward_for_backward"),
    "probing_s": (
        "probes", "projections", "one_sided_projections", "tangents", "guide", "slope", "node_slopes",
    ),
    "backward_s": ("backward",),
    "update_s": ("descend", "descend_along", "descend_nodes", "descend_by_feedback"),
}  # fmt: skip
"""A client's calls by phase of the step. A first-order update is part of its backward pass."""

_PIECE_ELEMENTS = 1 << 16


@dataclass(frozen=True)
class StepBench:
    """The settings of a measurement."""

    sizes: BenchSizes
    directions: int
    """Random directions of a step."""
    repeats: int
    """Measured steps of every method, after one that warms up."""
    memory_repeats: int
    """Measurements of every method's memory, each in a process of its own; 0: none."""


def bench_step(
    bench: StepBench, variants: Sequence[Variant], say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure every variant; `say` is called with lines of progress.

    Returns:
        The settings, and under `methods` the medians of each variant (`_timed`, `bench.memory.memory_row`).

    Raises:
        FailureError: if the shape is unknown or does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        half = random_halves(bench.sizes, Path(name)) / "client"
        configs = {v.name: v.config(cut=bench.sizes.cut, directions=bench.directions) for v in variants}
        memory = _memory(bench, half, configs, say) if bench.memory_repeats else {}
        times = _times(bench, half, configs, say)
    rows = [{"name": name, **times[name], **memory.get(name, {})} for name in configs]
    return {
        **bench.sizes.facts(), "directions": bench.directions, "repeats": bench.repeats,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "methods": rows,
    }  # fmt: skip


def _times(
    bench: StepBench, half: Path, configs: dict[str, Config], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    base: Any = load_half(half)
    clients = {name: make_client(config, sharing(base, config)) for name, config in configs.items()}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    begin = time.perf_counter()
    for number in range(bench.repeats + 1):  # round 0 warms up
        for name, client in clients.items():
            batch = fixed_batch(client, bench.sizes.rows, bench.sizes.tokens)
            figures = _timed(configs[name], client, batch, step=number + 1)
            rounds[name] += [figures] if number else []
        spent_s = time.perf_counter() - begin
        left_s = spent_s / (number + 1) * (bench.repeats - number)
        say(f"time, round {number} of {bench.repeats} of {len(clients)} methods; {left_s:.0f} s left")
    return {name: medians(of_method) for name, of_method in rounds.items()}


def _timed(config: Config, client: Any, batch: Batch, step: int) -> dict[str, Any]:
    """`timed_step`, and the seconds that its directions take."""
    return timed_step(config, client, batch, step) | {"directions_s": _drawing_s(config, client, step)}


def timed_step(config: Config, client: Any, batch: Batch, step: int) -> dict[str, Any]:
    """Seconds and bytes of one plain forward pass and one step of one method, by a client of any runtime."""
    begin = time.perf_counter()
    client.forward(batch)
    plain_s = time.perf_counter() - begin
    meter, server_meter = Meter(), Meter()
    method_round(config, metered(client, meter), metered(NoServer(), server_meter), batch, step)
    phases = {phase: sum(meter.by_call.get(call, 0.0) for call in calls) for phase, calls in PHASES.items()}
    probes = 2 * config.zo.directions
    return {
        "client_s": meter.seconds,
        **phases,
        "plain_forward_s": plain_s,
        "forwards": meter.seconds / plain_s,
        "over_2q_plus_1_forwards": meter.seconds / ((probes + 1) * plain_s),
        "probing_over_2q_forwards": phases["probing_s"] / (probes * plain_s),
        "bytes_up": server_meter.bytes_in,
        "bytes_down": server_meter.bytes_out,
        "hours_1500_steps": meter.seconds * STEPS_OF_A_RUN / 3600,
    }


def _drawing_s(config: Config, client: Any, step: int) -> float:
    """Seconds to draw only u of every trained tensor, as this step's probes do: bits once, numbers for each side."""
    if not isinstance(client, ZerothOrderClient):
        return 0.0
    sides = 1 if config.zo.sides == "one" or config.zo.derivative == "forward-mode" else 2
    piece = np.empty(_PIECE_ELEMENTS, dtype=np.float32)
    begin = time.perf_counter()
    for q in range(config.zo.directions):
        seed = direction_seed(config.seed, step, q)
        for name, p in client.trained.items():
            if client.distribution == "low-rank" and p.dim() > 1:
                low_rank_factors(seed, name, tuple(p.shape))
                continue
            u, elements = drawn(seed, name, tuple(p.shape), client.distribution, config.zo.epsilon), p.numel()
            for _ in range(sides):
                for start in range(0, elements, _PIECE_ELEMENTS):
                    stop = min(start + _PIECE_ELEMENTS, elements)
                    u.fill(start, stop, piece[: stop - start])
    return time.perf_counter() - begin


def _memory(
    bench: StepBench, half: Path, configs: dict[str, Config], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    rounds: dict[str, list[dict[str, int]]] = {name: [] for name in configs}
    for number in range(1, bench.memory_repeats + 1):
        for index, (name, config) in enumerate(configs.items(), start=1):
            say(f"memory, round {number} of {bench.memory_repeats}, {index} of {len(configs)}: {name}")
            rounds[name].append(client_alone(config, half, bench.sizes.rows, bench.sizes.tokens))
    figures = {name: medians(of_method) for name, of_method in rounds.items()}
    plain = figures.get(FORWARD.name)
    return {name: memory_row(of_method, plain) for name, of_method in figures.items()}


def sharing(base: Any, config: Config) -> Any:
    """A half of its own for one client, whose weights are those of `base` as long as nothing converts them."""
    shared = {
        id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in base.model.parameters()
    }
    half = deepcopy(base, dict(shared))
    return half.convert(DTYPES[config.model.dtype])


def medians(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of every figure over rounds that have the same ones."""
    return {key: median(figures[key] for figures in rounds) for key in rounds[0]}
