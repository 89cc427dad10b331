"""The authors' dropout, taken apart: what it does to the client's estimate, to training, and to the evaluation.

    python benchmarks/dropout.py [--seeds 0 1 2] [--steps 60]     # resumes

The setting of examples/studies/authors-head.yaml. Rows: hosl with the server's gradient at the first + probe (the
authors' D1 alone), and their profile (dropout in L+, in the server's step and in evaluation), each at client rate
1e-6 and 0. The profile's weights are scored twice, with dropout on, as the authors' code does, and off. Coefficients
are (L+ - L-) / (2 epsilon), in nats.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hosl.evaluation import evaluate
from hosl.parties.torch_server import FirstOrderServer
from hosl.run.local import load_run
from hosl.run.study_table import of_seeds, spread_text

OUT = Path("runs/dropout")
HOSL = [sys.executable, "-c", "import sys; from hosl.cli import main; sys.exit(main())"]
ROWS = {"first-plus": ["--zo.fo_point", "first-plus"], "authors-head": ["--profile", "authors-head"]}
RATES = (1e-6, 0.0)


def trained(row: str, rate: float, seed: int, steps: int) -> Path:
    """The run's folder; trained on the first call, gone on with where it was interrupted."""
    folder = OUT / f"{row}-{rate:g}-{steps}-seed{seed}"
    settings = [
        "--output_dir", str(folder), "--profile", "paper", "--seed", str(seed), "--model.cut", "6",
        "--zo.directions", "1",
        "--client.trainable", "blocks", "--client.learning_rate", str(rate), "--server.learning_rate", "0.1",
        "--max_steps", str(steps), "--eval_steps", str(steps), "--save_steps", str(steps), *ROWS[row],
    ]  # fmt: skip
    how = ["--resume", str(folder)] if folder.exists() else ["examples/authors-head.yaml", *settings]
    subprocess.run([*HOSL, "train", *how], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return folder


class _Quiet:
    """The server's scores without dropout, whatever its profile."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def scores(self, activations: Any, targets: Any) -> Any:
        return FirstOrderServer.scores(self._server, activations, targets)


def measured(row: str, rate: float, seed: int, steps: int) -> Iterator[dict[str, Any]]:
    """One line per way of evaluating; test accuracy in %, loss in nats."""
    folder = trained(row, rate, seed, steps)
    session = load_run(folder)
    ways = {"off": _Quiet(session.server)} | ({"on": session.server} if row == "authors-head" else {})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    found = [c for line in lines for c in line.get("coefficients", ())]
    for dropout, server in ways.items():
        score = evaluate(session.client, server, session.task, session.task.test, rows_per_batch=64)  # type: ignore[arg-type]
        yield {
            "row": row, "client_rate": rate, "seed": seed, "dropout_in_evaluation": dropout,
            "test_accuracy": 100 * score.accuracy, "test_loss_nats": score.loss_nats,
            "coefficient_rms_nats": float(np.sqrt(np.mean(np.square(found)))),
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


def main() -> None:
    """Train what is missing, score it, write runs.csv, print the table."""
    parser = argparse.ArgumentParser(description="the authors' dropout, taken apart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    known = parser.parse_args()
    found = [
        line
        for row in ROWS
        for rate in RATES
        for seed in known.seeds
        for line in measured(row, rate, seed, known.steps)
    ]
    with (OUT / "runs.csv").open("w", newline="", encoding="utf-8") as out:
        lines = csv.DictWriter(out, list(found[0]))
        lines.writeheader()
        lines.writerows(found)
    print(table(found))


if __name__ == "__main__":
    main()
