"""`hosl bench step --runtime onnx`: the time of a client's step on the inference engine, beside torch's, in one run.

Both clients of a method follow each other in every round, on one thread each. Read the ratios.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hosl.bench.edge_memory import GRAPHS, engine_configs
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.bench.step import medians, sharing, timed_step
from hosl.config import Config
from hosl.core.targets import Batch
from hosl.methods.synthetic import fixed_batch
from hosl.methods.torch_parties import make_client
from hosl.methods.variants import Variant
from hosl.parties.edge.engine import engine_version
from hosl.parties.edge.make import make_edge_client
from hosl.split import load_half


def bench_edge_step(
    sizes: BenchSizes,
    directions: int,
    repeats: int,
    variants: Sequence[Variant],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every variant on either runtime; returns the settings, and under `methods` the medians of each variant.

    Args:
        sizes: the model and the batch.
        directions: random directions of a step.
        repeats: measured steps of every variant, after one that warms up.
        variants: the rows of the table.
        say: is called with lines of progress.

    Raises:
        ConfigError: if the engine is not installed, or has not what a variant asks for.
        FailureError: if the shape is unknown or does not fit.
    """
    version = engine_version()
    configs = engine_configs(sizes, directions, variants)
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name, _one_thread():
        say("making a half and its graphs")
        half = random_halves(sizes, Path(name), GRAPHS) / "client"
        base: Any = load_half(half)
        pairs = {
            name: (make_edge_client(config, half), make_client(config, sharing(base, config)))
            for name, config in configs.items()
        }
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
        begin = time.perf_counter()
        for number in range(repeats + 1):  # round 0 warms up
            for name, (edge, client) in pairs.items():
                batch = fixed_batch(client, sizes.rows, sizes.tokens)
                figures = _both(configs[name], edge, client, batch, number + 1)
                rounds[name] += [figures] if number else []
            left_s = (time.perf_counter() - begin) / (number + 1) * (repeats - number)
            say(f"round {number} of {repeats} of {len(pairs)} methods; {left_s:.0f} s left")
    rows = [{"name": name, **medians(of_method)} for name, of_method in rounds.items()]
    return {
        **sizes.facts(), "directions": directions, "repeats": repeats, "threads": 1, "torch": torch.__version__,
        "onnxruntime": version, "methods": rows,
    }  # fmt: skip


def _both(config: Config, edge: Any, client: Any, batch: Batch, step: int) -> dict[str, Any]:
    """The figures of one step on either runtime; ratios are within this round."""
    on_engine, on_torch = (timed_step(config, party, batch, step) for party in (edge, client))
    pairs = {}
    if "client" in config.method_row.draws:
        pair = "probing_over_2q_forwards"
        pairs = {"pair_over_two_forwards": on_engine[pair], "torch_pair": on_torch[pair]}
    return {
        "client_s": on_engine["client_s"],
        "torch_s": on_torch["client_s"],
        "over_torch": on_engine["client_s"] / on_torch["client_s"],
        "forward_over_torch": on_engine["plain_forward_s"] / on_torch["plain_forward_s"],
        "step_over_forwards": on_engine["forwards"],
        "torch_step": on_torch["forwards"],
        **pairs,
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Context manager: torch computes on one thread, as the engine does."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
