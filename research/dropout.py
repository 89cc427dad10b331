"""The authors' dropout, taken apart: what it does to the client's estimate, to training, and to the evaluation.

    python research/dropout.py     # resumes

The setting of examples/studies/authors-head.yaml. Rows: hosl with the server's gradient at the first + probe (the
authors' D1 alone), and their profile (dropout in L+, in the server's step and in evaluation), each at client rate
1e-6 and 0. The profile's weights are scored twice, with dropout on, as the authors' code does, and off. Coefficients
are (L+ - L-) / (2 epsilon), in nats.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hosl.evaluation import evaluate
from hosl.parties.servers.basic import FirstOrderServer
from hosl.report.statistics import spread_text
from hosl.study.files import Places, read_summaries
from hosl.study.grid import Arm, Grid, Summary, merged
from hosl.study.run import run_grid
from hosl.study.tables import of_seeds
from hosl.system.run_folder import read_lines
from hosl.training.local_session import load_run

BASE = merged(
    yaml.safe_load(Path("examples/authors-head.yaml").read_text()),
    {
        "profile": "paper", "model": {"cut": 6}, "zo": {"directions": 1}, "client": {"trainable": "blocks"},
        "max_steps": 60, "eval_steps": 60, "save_steps": 60,
    },
)  # fmt: skip
WAYS = {
    "first-plus": {"zo": {"server_gradient_at": "first-plus"}},
    "authors-head": {"profile": "authors-head"},
}
ARMS = tuple(
    Arm(name if rate else f"{name}-still", merged(BASE, way), (rate,), server_learning_rates=(0.1,))
    for name, way in WAYS.items()
    for rate in (1e-6, 0.0)
)
GRID = Grid(ARMS, seeds=(0, 1, 2))
PLACES = Places.below(Path("runs/dropout"))


class _Quiet:
    """The server's scores without dropout, whatever its profile."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def scores(self, activations: Any, targets: Any) -> Any:
        return FirstOrderServer.scores(self._server, activations, targets)


def measured(run: Summary) -> Iterator[dict[str, Any]]:
    """One line per way of evaluating; test accuracy in %, loss in nats."""
    folder = Path(run["run"])
    session = load_run(folder)
    ways: dict[str, Any] = {"off": _Quiet(session.server)}
    if session.config.profile == "authors-head":
        ways["on"] = session.server
    found = [c for line in read_lines(folder / "metrics.jsonl") for c in line.get("coefficients", ())]
    for dropout, server in ways.items():
        score = evaluate(session.client, server, session.task, session.task.test, rows_per_batch=64)
        yield {
            "row": run["row"].removesuffix("-still"), "client_rate": run["rate"], "seed": run["seed"],
            "dropout_in_evaluation": dropout, "test_accuracy": 100 * score.accuracy,
            "test_loss_nats": score.loss_nats, "coefficient_rms_nats": float(np.sqrt(np.mean(np.square(found)))),
        }  # fmt: skip


def table(found: list[dict[str, Any]]) -> str:
    """Mean and spread over the seeds of every row."""
    columns = {"test_accuracy": 2, "test_loss_nats": 4, "coefficient_rms_nats": 1}
    lines = [
        "| row | client rate | dropout in evaluation | test accuracy, % | test loss, nats | rms coefficient |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((f["row"], f["client_rate"], f["dropout_in_evaluation"]) for f in found):
        same = [f for f in found if (f["row"], f["client_rate"], f["dropout_in_evaluation"]) == key]
        cells = [spread_text(of_seeds(same, column), digits) for column, digits in columns.items()]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    made = GRID.chosen(run_grid(GRID, PLACES, done=read_summaries(GRID, PLACES), keep_models=True))
    scored = [line for runs in made.values() for run in runs for line in measured(run)]
    with (PLACES.runs.parent / "runs.csv").open("w", newline="", encoding="utf-8") as out:
        lines = csv.DictWriter(out, list(scored[0]))
        lines.writeheader()
        lines.writerows(scored)
    print(table(scored))
