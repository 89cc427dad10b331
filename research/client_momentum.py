"""Momentum on a zeroth-order client, without a buffer of the weights' size: by the seeds of all steps so far.

    python research/client_momentum.py     # resumes

The setting of examples/studies/open-questions.yaml, whose row hosl is momentum 0 at 1e-5 here. v <- 0.9 v + g is linear
in the estimates g, each known by its seeds and coefficients, so that a step applies them all again, decayed. A rate of
r under momentum 0.9 moves the client, in the long run, as far as 10 r without.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hosl.config import parse_config, read_yaml
from hosl.evaluation import evaluate
from hosl.methods.schedule import batch_of_step
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.report.statistics import spread_text
from hosl.study.grid import merged
from hosl.study.tables import of_seeds
from hosl.system.atomic import whole_file
from hosl.training.local_session import LocalSession, new_session

STUDY = Path("examples/studies/open-questions.yaml")
OUT = Path("runs/client-momentum")
SETTINGS = {
    "method": "hosl",
    "model": {"cut": 6},
    "server": {"learning_rate": 3e-3, "optimiser": {"name": "sgd"}},
}
ROWS = ((0.0, 1e-6), (0.9, 1e-6), (0.0, 1e-5), (0.9, 1e-5), (0.0, 1e-4))
SEEDS = (0, 1, 2)


class ReplayedMomentum:
    """A zeroth-order client that descends along all directions so far, the older ones decayed."""

    def __init__(self, client: ZerothOrderClient, momentum: float) -> None:
        self._client, self._momentum = client, momentum
        self._seeds: list[int] = []
        self._coefficients: list[float] = []

    def __getattr__(self, call: str) -> Any:
        return getattr(self._client, call)

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c sum_s momentum^(t - s) g_s, each g_s a mean over its step's directions."""
        if self._momentum == 0:
            return self._client.descend(step, seeds, coefficients, learning_rate)
        self._seeds += seeds
        self._coefficients = [self._momentum * c_q for c_q in self._coefficients] + list(coefficients)
        over_all = len(self._seeds) / len(seeds)  # the client divides by all that it is given
        self._client.descend(step, self._seeds, self._coefficients, learning_rate * over_all)


def made(momentum: float, rate: float, seed: int) -> dict[str, Any]:
    """One run's summary, from before or from a run in this process."""
    file = OUT / f"momentum{momentum:g}-{rate:g}-seed{seed}.json"
    if file.exists():
        return json.loads(file.read_text("utf-8"))
    content = cast(dict[str, Any], read_yaml(STUDY, kind="study", instead=""))["base"]
    settings = merged(merged(content, SETTINGS), {"seed": seed, "client": {"learning_rate": rate}})
    session = new_session(parse_config(settings, where=str(STUDY)))
    session.client = cast(Any, ReplayedMomentum(cast(ZerothOrderClient, session.client), momentum))
    for step in range(1, session.config.max_steps + 1):
        session.round(batch_of_step(session.config, session.task, step), step)
        session.done(step)
    summary = {"momentum": momentum, "client_rate": rate, "seed": seed} | scored(session)
    OUT.mkdir(parents=True, exist_ok=True)
    whole_file(file, json.dumps(summary).encode())
    return summary


def scored(session: LocalSession) -> dict[str, float]:
    """Test accuracy, and losses in nats."""
    found = {
        name: evaluate(
            session.client, session.server, session.task, examples,
            rows_per_batch=session.config.per_device_eval_batch_size,
        )
        for name, examples in (("dev", session.task.dev), ("test", session.task.test))
    }  # fmt: skip
    return {
        "dev_loss_nats": found["dev"].loss_nats, "test_loss_nats": found["test"].loss_nats,
        "test_accuracy": found["test"].accuracy,
    }  # fmt: skip


if __name__ == "__main__":
    print("| momentum | client rate | test accuracy, % | test loss, nats | dev loss, nats |")
    print("|---|---|---|---|---|")
    summaries = []
    for momentum, rate in ROWS:
        runs = [made(momentum, rate, seed) for seed in SEEDS]
        accuracy = spread_text(100 * of_seeds(runs, "test_accuracy"), 2)
        losses = [spread_text(of_seeds(runs, f"{part}_loss_nats"), 4) for part in ("test", "dev")]
        print(f"| {momentum:g} | {rate:g} | {accuracy} | {' | '.join(losses)} |", flush=True)
        summaries += runs
    with (OUT / "runs.csv").open("w", newline="", encoding="utf-8") as out:
        lines = csv.DictWriter(out, list(summaries[0]))
        lines.writeheader()
        lines.writerows(summaries)
