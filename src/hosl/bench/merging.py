"""`hosl bench merging`: questions of several clients in one forward pass of the server's half, against each alone.

Both ways in one run, in turns, in CPU seconds of this process: read the ratios. Activations are random numbers, each
client has its own scored position.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.core.targets import OptionTargets
from hosl.parties.servers.synchronous import Contributed, SynchronousServer
from hosl.split import load_half


@dataclass(frozen=True, slots=True)
class Crowd:
    """Clients that ask at once: each has so many rows of so many tokens."""

    clients: int
    rows: int
    tokens: int

    @property
    def name(self) -> str:
        """Its name in a table."""
        return f"{self.clients} x {self.rows} x {self.tokens}"


CROWDS = (Crowd(8, 1, 16), Crowd(8, 4, 16), Crowd(8, 1, 64), Crowd(4, 4, 64), Crowd(8, 4, 64))
_EPSILON = 1e-3
"""The size of what a probe changes in the activations, beside numbers of about 1."""


def bench_merging(
    shape: str,
    cut: int,
    crowds: Sequence[Crowd] = CROWDS,
    *,
    merge_tokens: int = 1024,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every crowd; `say` is called with lines of progress.

    Args:
        shape: the name of a known shape.
        cut: blocks on the client.
        crowds: the clients.
        merge_tokens: the tokens of a pass, at most, as of `hosl serve --merge-tokens`.
        repeats: measured ones, after one that warms up.
        say: see above.

    Returns:
        The settings, and under `methods` for each crowd the CPU seconds and ratios: of one client's pair in one pass
        (`pair`), of all clients' pairs (`losses`), and of all clients' contributions to a round (`round`).

    Raises:
        FailureError: if the shape is unknown or does not fit.
    """
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        half: Any = load_half(random_halves(BenchSizes(shape, cut, 1, 1), Path(name)) / "server")
        server = SynchronousServer(half, learning_rate=lambda step: 0.0)
        rows = []
        for number, crowd in enumerate(crowds, start=1):
            rows.append(_measured(server, crowd, merge_tokens, repeats))
            say(f"{number} of {len(crowds)}: {crowd.name} done")
    return {
        "shape": shape, "cut": cut, "merge_tokens": merge_tokens, "repeats": repeats,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "methods": rows,
    }  # fmt: skip


def _measured(server: SynchronousServer, crowd: Crowd, merge_tokens: int, repeats: int) -> dict[str, Any]:
    questions = _questions(server, crowd)
    tokens = crowd.rows * crowd.tokens
    (pair, targets), parts = questions[0], [Contributed(h[0], t, crowd.rows, True) for h, t in questions]

    def each_alone() -> list[float]:
        return [loss for h, t in questions for loss in server.losses(h, t)]

    def together() -> list[float]:
        passes = [server.losses_together(some) for some in _passes(questions, 2 * tokens, merge_tokens)]
        return [loss for answers in passes for pair in answers for loss in pair]

    def rounds_alone() -> None:
        for part in parts:
            server.contribute(part.activations, part.targets, part.weight, want_gradient=True)

    def rounds_together() -> None:
        for some in _passes(parts, tokens, merge_tokens):
            server.contribute_together(some)

    works = {
        "pair alone": lambda: server.losses(pair, targets),
        "pair merged": lambda: server.losses_together([(pair, targets)]),
        "alone": each_alone, "merged": together,
        "round alone": rounds_alone, "round merged": rounds_together,
    }  # fmt: skip
    cpu_s = cpu_seconds(works, repeats)
    server.apply(1)
    moved = max(abs(a - b) / abs(a) for a, b in zip(each_alone(), together(), strict=True))
    return {
        "name": crowd.name,
        "tokens": 2 * crowd.clients * tokens,
        "pair": cpu_s["pair alone"] / cpu_s["pair merged"],
        "alone_cpu_s": cpu_s["alone"],
        "merged_cpu_s": cpu_s["merged"],
        "losses": cpu_s["alone"] / cpu_s["merged"],
        "round": cpu_s["round alone"] / cpu_s["round merged"],
        "moved": moved,
    }


def _passes(questions: Sequence[Any], tokens: int, merge_tokens: int) -> list[Sequence[Any]]:
    """The questions of each pass, where each has so many tokens."""
    most = max(merge_tokens // tokens, 1)
    return [questions[first : first + most] for first in range(0, len(questions), most)]


def _questions(server: SynchronousServer, crowd: Crowd) -> list[tuple[list[torch.Tensor], OptionTargets]]:
    """The pairs of all clients, each with its own scored position; one position is padding, as in batches of text."""
    config: Any = server.half.config
    width, generator = config.get_text_config().hidden_size, torch.Generator().manual_seed(0)
    asked = []
    for client in range(crowd.clients):
        shape = (crowd.rows, crowd.tokens, width)
        h, change = (torch.randn(shape, generator=generator) for _ in range(2))
        mask = np.ones(shape[:2], np.int8)
        mask[0, 0] = 0
        positions = np.full((crowd.rows, 1), crowd.tokens - 2 - client % 4, np.int32)
        tokens = np.full((crowd.rows, 1), 17 + client, np.int32)
        pair = [h + _EPSILON * change, h - _EPSILON * change]
        asked.append((pair, OptionTargets(mask, positions, tokens)))
    return asked


def cpu_seconds(works: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median CPU seconds of this process for each work; all take their turns in each round, after one that warms up."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for number in range(repeats + 1):
        for name, work in works.items():
            begin = time.process_time()
            work()
            spent[name] += [time.process_time() - begin] if number else []
    return {name: median(seconds) for name, seconds in spent.items()}
