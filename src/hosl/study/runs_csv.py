"""runs.csv of a study, one line per run: for whoever draws tables of their own. Parquet too where pyarrow is there."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hosl.report.runs import CHOSEN_RUNS
from hosl.study.config import Group
from hosl.study.grid import Summary
from hosl.system.atomic import whole_file

METRICS = (
    "steps", "train_loss_nats", "dev_accuracy", "dev_loss_nats", "test_accuracy", "test_loss_nats", "median_step_s",
    "client_peak_bytes", "server_peak_bytes", "process_peak_bytes", "bytes_up_per_step", "bytes_down_per_step",
)  # fmt: skip
"""What a line has of a run's own summary."""


def write_runs(
    groups: list[Group],
    made: Sequence[Summary],
    chosen: dict[str, list[Summary]],
    out: Path,
) -> None:
    """Write runs.csv, and runs.parquet if pyarrow can be imported."""
    lines = run_lines(groups, made, chosen)
    whole_file(out / CHOSEN_RUNS, csv_of(lines))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), out / "runs.parquet")


def csv_of(lines: Sequence[dict[str, Any]]) -> bytes:
    """The content of a CSV file with these lines, which have the same keys."""
    text = io.StringIO(newline="")
    rows = csv.DictWriter(text, list(lines[0]))
    rows.writeheader()
    rows.writerows(lines)
    return text.getvalue().encode()


def run_lines(
    groups: list[Group], made: Sequence[Summary], chosen: dict[str, list[Summary]]
) -> list[dict[str, Any]]:
    """Line per run; test stays empty but for chosen runs, as nobody may choose by it."""
    placed = {arm: (group, name) for group in reversed(groups) for name, arm in group.arms.items()}
    picked = {
        (run["row"], run["seed"], run["rate"], run["server_rate"]) for runs in chosen.values() for run in runs
    }
    lines = []
    for summary in made:
        group, name = placed[summary["row"]]
        config = summary["config"]
        is_chosen = (summary["row"], summary["seed"], summary["rate"], summary["server_rate"]) in picked
        line = {
            "task": group.task, "row": name, "method": config["method"], "model": config["model"]["name"],
            "cut": config["model"]["cut"], "directions": config["zo"]["directions"],
            "client_trainable": config["client"]["trainable"], "client_rate": summary["rate"],
            "server_rate": summary["server_rate"], "seed": summary["seed"], "chosen": is_chosen,
            "diverged": "diverged" in summary,
        }  # fmt: skip
        for key in METRICS:
            hidden = key.startswith("test_") and not is_chosen
            line[key] = None if hidden else summary.get(key)
        line |= {part: summary["versions"][part] for part in ("hosl", "torch", "machine")}
        lines.append(line | {"command": summary["command"]})
    return lines
