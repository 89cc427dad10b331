"""`hosl bench step`: what a client's step costs, for every method, against plain forward passes of the same half.

Everything is measured in one run, method after method and then again (interleaved), because absolute times are noisy:
read the ratios. The server is made up and answers at once; no time or memory of a server or a network is in any figure.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hosl.bench.isolated_client import client_alone
from hosl.bench.random_halves import random_halves
from hosl.config import Config
from hosl.core.directions import direction_seed, drawn, low_rank_factors
from hosl.core.targets import Batch
from hosl.methods.rows import FORWARD, Row
from hosl.methods.step import method_round
from hosl.methods.synthetic import NoServer, fixed_batch
from hosl.methods.torch_parties import DTYPES, make_client
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.metered import Meter, Metered
from hosl.split import load_half

STEPS_OF_A_RUN = 1500
"""What hours are projected for."""

PHASES = {
    "forward_s": ("forward", "forward_for_guides", "forward_for_backward"),
    "probing_s": (
        "probes",
        "projections",
        "one_sided_projections",
        "tangents",
        "guide",
        "slope",
        "node_slopes",
    ),
    "backward_s": ("backward",),
    "update_s": ("descend", "descend_along", "descend_nodes"),
}
"""A client's calls by what they do. A first-order update is part of its backward pass."""

_PIECE_ELEMENTS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What is measured."""

    shape: str = "opt-125m"
    """Random weights in this shape (`hosl.split.shapes`)."""
    cut: int = 5
    rows: int = 16
    tokens: int = 64
    directions: int = 10
    repeats: int = 5
    """Of every method's step, after one that warms up."""
    memory_repeats: int = 1
    """Of every method's memory, each in a process of its own; 0: none."""


def bench_step(
    bench: StepBench, rows: Sequence[Row], say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Measure; `say` is told what is under way.

    Returns:
        The settings, and for each row its medians (`_timed`, `bench_memory.memory_of`).

    Raises:
        FailureError: if the shape is unknown or does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        half = random_halves(bench.shape, bench.cut, Path(name)) / "client"
        configs = {row.name: row.config(cut=bench.cut, directions=bench.directions) for row in rows}
        memory = _memory(bench, half, configs, say) if bench.memory_repeats else {}
        times = _times(bench, half, configs, say)
    lines = [{"name": row.name, **times[row.name], **memory.get(row.name, {})} for row in rows]
    return {
        "shape": bench.shape, "cut": bench.cut, "rows": bench.rows, "tokens": bench.tokens,
        "directions": bench.directions, "repeats": bench.repeats, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "methods": lines,
    }  # fmt: skip


def _times(
    bench: StepBench, half: Path, configs: dict[str, Config], say: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    base: Any = load_half(half)
    clients = {name: make_client(config, _sharing(base, config)) for name, config in configs.items()}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    begin = time.perf_counter()
    for turn in range(bench.repeats + 1):  # the first warms up
        for name, client in clients.items():
            batch = fixed_batch(client, bench.rows, bench.tokens)
            found = _timed(configs[name], client, batch, step=turn + 1)
            turns[name] += [found] if turn else []
        spent = time.perf_counter() - begin
        left = spent / (turn + 1) * (bench.repeats - turn)
        say(f"time, round {turn} of {bench.repeats} of {len(clients)} methods; {left:.0f} s left")
    return {name: _medians(of_turns) for name, of_turns in turns.items()}


def _timed(config: Config, client: Any, batch: Batch, step: int) -> dict[str, Any]:
    """One plain forward pass and one step of one method, seconds and bytes."""
    begin = time.perf_counter()
    client.forward(batch)
    plain_s = time.perf_counter() - begin
    of_client, of_server = Meter(), Meter()
    method_round(config, Metered(client, of_client), Metered(NoServer(), of_server), batch, step)
    phases = {
        phase: sum(of_client.by_call.get(call, 0.0) for call in calls) for phase, calls in PHASES.items()
    }
    directions_s = _drawing_s(config, client, step)
    probes = 2 * config.zo.directions
    return {
        "client_s": of_client.seconds,
        **phases,
        "directions_s": directions_s,
        "plain_forward_s": plain_s,
        "forwards": of_client.seconds / plain_s,
        "over_2q_plus_1_forwards": of_client.seconds / ((probes + 1) * plain_s),
        "probing_over_2q_forwards": phases["probing_s"] / (probes * plain_s),
        "bytes_up": of_server.bytes_in,
        "bytes_down": of_server.bytes_out,
        "hours_1500_steps": of_client.seconds * STEPS_OF_A_RUN / 3600,
    }


def _drawing_s(config: Config, client: Any, step: int) -> float:
    """Seconds to draw every trained tensor's u alone, as this step's probes do: bits once, numbers for each side."""
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
    from hosl.bench.memory import memory_of

    turns: dict[str, list[dict[str, int]]] = {name: [] for name in configs}
    for turn in range(bench.memory_repeats):
        for place, (name, config) in enumerate(configs.items()):
            say(f"memory, round {turn + 1} of {bench.memory_repeats}, {place + 1} of {len(configs)}: {name}")
            turns[name].append(client_alone(config, half, bench.rows, bench.tokens))
    found = {name: _medians(of_turns) for name, of_turns in turns.items()}
    plain = found.get(FORWARD.name)
    return {name: memory_of(of_row, plain) for name, of_row in found.items()}


def _sharing(base: Any, config: Config) -> Any:
    """A half of its own for one client, whose weights are those of `base` as long as nothing converts them."""
    shared = {
        id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in base.model.parameters()
    }
    half = deepcopy(base, dict(shared))
    return half.convert(DTYPES[config.model.dtype])


def _medians(turns: Iterable[dict[str, Any]]) -> dict[str, Any]:
    of_turns = list(turns)
    return {key: median(turn[key] for turn in of_turns) for key in of_turns[0]}
