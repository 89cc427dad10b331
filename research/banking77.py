"""Does the client learn? Every method at equal steps on BANKING77 with the whole encoder on the device; five seeds.

    HOSL_DATA=... python research/banking77.py [--table] [--curves FILE.svg] [--memory FILE.svg]

It goes on where it was stopped; with --table it makes no run.

Four tries per method on seed 0, the lowest dev loss chosen. The server's rate is tuned on the frozen client and kept.
No forward-only row has more than 2Q + 1 = 5 forward passes a step: hosl-node evaluates 1 block of 6, 16 times.
"""

import argparse
import statistics
from pathlib import Path

import yaml

from hosl.report import figures
from hosl.report.comparison import ACCURACY, LOSS, Row
from hosl.report.style import looks, on_paper
from hosl.study.files import Places, read_summaries
from hosl.study.grid import Arm, Grid, merged
from hosl.study.run import run_grid
from hosl.study.tables import dev_curve, study_arm

BASE = yaml.safe_load(Path("examples/banking77.yaml").read_text())
ZO = (1e-7, 1e-6, 1e-5, 1e-4)
SGD = (3e-3, 1e-2, 3e-2, 1e-1)
ADAMW = {"optimiser": {"name": "adamw"}}
ADAPTERS = {"client": {"trainable": "lora"}}
LAST_BLOCK = {"client": {"trainable": "last-block"}}


def _method(name: str, **settings: dict) -> dict:
    return merged(BASE, {"method": name, **settings})


ARMS = (
    Arm("frozen", _method("frozen"), server_learning_rates=(3e-4, 1e-3, 3e-3, 1e-2)),
    # the lowest of four was the best: one more below it, here and in the next two rows of backprop
    Arm("fo-fo-sgd", _method("fo-fo"), (1e-3, *SGD)),
    # the table in docs/results has hosl-guided, too, which is no more (ADR 22)
    Arm("hosl-node", _method("hosl-node", zo={"directions": 16}), SGD),
    Arm("fo-recompute-last-block", _method("fo-recompute", **LAST_BLOCK), SGD),
    Arm("hosl-gradient", _method("hosl-gradient"), ZO),
    Arm("hosl", _method("hosl"), ZO),
    Arm("fo-fo-adamw", _method("fo-fo", client=ADAMW), (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    Arm("hosl-gradient-low-rank", _method("hosl-gradient", zo={"distribution": "low-rank"}), ZO),
    Arm("zo-zo", _method("zo-zo"), (1e-6, 1e-5, 1e-4, 1e-3), one_rate=True),
    Arm("hosl-gradient-lora", _method("hosl-gradient", **ADAPTERS), (1e-4, 1e-3, 1e-2, 1e-1)),
    Arm("fo-fo-lora", _method("fo-fo", client=ADAMW | {"trainable": "lora"}), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
    Arm("hosl-gradient-gaussian", _method("hosl-gradient", zo={"distribution": "gaussian"}), ZO),
)
FIRST_ORDER = "fo-fo-sgd"
"""The row that gap closure takes for 1: the same update rule as the forward-only rows, plain SGD on the client."""
DRAWN = (
    "frozen",
    "hosl",
    "hosl-gradient-lora",
    "hosl-guided",
    "hosl-node",
    "fo-recompute-last-block",
    "fo-fo-sgd",
)
"""Rows that are told apart in a picture; zo-zo is off its scale."""

GRID = Grid(ARMS, seeds=(0, 1, 2, 3, 4))
RESULTS = Path("research/results/banking77")
"""From the root, as is everything here: a summary's command holds for every checkout."""
PLACES = Places(summaries=RESULTS, configs=RESULTS / "configs", runs=Path("runs/banking77-study"))


def table(chosen: dict[str, list[dict]]) -> str:
    """Markdown: mean and sd over seeds, gap closure with its interval, memory and time."""
    arms = {name: study_arm(name, runs) for name, runs in chosen.items()}
    lines = [
        "| method | client rate | test accuracy | G (accuracy) | test loss, nats | G (loss) | client peak MiB "
        "| s/step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in chosen.items():
        row = Row(arms[name], arms["frozen"], arms[FIRST_ORDER])
        accuracy, loss = row.measure(ACCURACY), row.measure(LOSS)
        lines.append(
            f"| {name} | {runs[0]['rate']:g} | {accuracy.spread} | {accuracy.gap} | {loss.spread} | {loss.gap} | "
            f"{max(r['client_peak_bytes'] for r in runs) / 2**20:.0f} | "
            f"{statistics.median(r['median_step_s'] for r in runs):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--table", action="store_true", help="of what is there; make no run")
    words.add_argument("--curves", type=Path, help="where to draw the dev losses of the rows of DRAWN")
    words.add_argument("--memory", type=Path, help="where to draw their accuracy against the client's memory")
    known = words.parse_args()
    done = read_summaries(GRID, PLACES)
    rows = GRID.chosen(done if known.table else run_grid(GRID, PLACES, done=done))
    print(table(rows))
    title = "BANKING77, MiniLM-L6, all six blocks on the device"
    drawn = looks({arm.name: arm.settings["method"] for arm in ARMS if arm.name in DRAWN}, on_paper)
    shown = {name: rows[name] for name in DRAWN if name in rows}
    if known.curves is not None:
        curves = {name: dev_curve(runs) for name, runs in shown.items()}
        figures.save(figures.dev_losses(curves, {}, title, drawn), known.curves, drawn)
    if known.memory is not None:
        arms = [study_arm(name, runs) for name, runs in shown.items()]
        figures.save(figures.accuracy_against_memory(arms, drawn, title), known.memory, drawn)
