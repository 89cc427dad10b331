"""Own or common directions of K devices: what the theory's two variances are on a model in training.

    python research/direction_variance.py

The variance of a round's estimate, Q = 1, is d times |mean g_k|^2 with common directions and mean |g_k|^2 / K with own
ones (docs/concepts/methods.md, d); g_k is device k's exact gradient over 16 rows of the embedded task that no other
has, by autograd. One client half, frozen, while the server trains for 60 steps.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hosl.config import parse_config
from hosl.methods.schedule import batch_of_step
from hosl.report.statistics import spread_text
from hosl.training.local_session import LocalSession, new_session

OUT = Path("runs/direction-variance")
CLIENTS = (2, 4, 8)
AT = (0, 30, 60)
SEEDS = (0, 1, 2)
ROWS = 16
CONFIG = {
    "method": "frozen", "model": {"name": "all-MiniLM-L6-v2", "cut": 6},
    "task": {"kind": "docstrings", "max_tokens": 48}, "per_device_train_batch_size": ROWS,
    "server": {"learning_rate": 3e-3, "optimiser": {"name": "adamw"}},
}  # fmt: skip


def gradients(session: LocalSession, seed: int) -> np.ndarray:
    """[clients, d] in float64: dL/dtheta_c of as many batches, each of rows that no other has."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(session.task.train))
    trained = [p for name, p in session.client.half.model.named_parameters() if "embeddings" not in name]
    for p in trained:
        p.requires_grad_(True)
    found = []
    for client in range(max(CLIENTS)):
        rows = order[client * ROWS : (client + 1) * ROWS]
        batch = session.task.collate([session.task.train[i] for i in rows])
        h = session.client.half(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask))
        of_h = session.server.gradient(h.detach(), batch.targets).gradient
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(h, trained, of_h)]).double().numpy())
    return np.stack(found)


def train(session: LocalSession, until: int) -> None:
    """Steps of the server alone."""
    for step in range(session.step + 1, until + 1):
        session.round(batch_of_step(session.config, session.task, step), step)
        session.done(step)


def ratios(seed: int) -> Iterator[tuple[int, int, float]]:
    """(step, K, own variance / common variance)."""
    session = new_session(parse_config(CONFIG | {"seed": seed}, where=__file__))
    for step in AT:
        train(session, step)
        found = gradients(session, seed)
        for clients in CLIENTS:
            g = found[:clients]
            yield step, clients, float((g**2).sum(1).mean() / clients / (g.mean(0) ** 2).sum())


if __name__ == "__main__":
    found = [(seed, *place) for seed in SEEDS for place in ratios(seed)]
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "ratios.csv").open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([("seed", "server_steps", "clients", "own_over_common"), *found])
    print("| server steps | " + " | ".join(f"K = {clients}" for clients in CLIENTS) + " |")
    print("|---|" + "---|" * len(CLIENTS))
    for step in AT:
        cells = [[ratio for _, at, k, ratio in found if (at, k) == (step, clients)] for clients in CLIENTS]
        print(f"| {step} | {' | '.join(spread_text(np.array(cell), 2) for cell in cells)} |")
