"""A comparison of methods as its users would make it: each row tuned on dev with a few tries, then run with all seeds.

Rows are data (`Row`). A run is one `hosl train` in a process of its own; its summary is kept as JSON with its command,
and a run whose summary is there is not made again. Test is read from the chosen runs only. Studies: sst2.py,
banking77.py.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hosl.run.record import read_lines


@dataclass(frozen=True)
class Row:
    """A row of the table: how it is run and which learning rates are tried."""

    name: str
    words: tuple[str, ...]
    """Settings, as `hosl train` reads them."""
    rates: tuple[float, ...] = (0.0,)
    """Of the client, tried on the first seed."""
    server_rates: tuple[float, ...] = ()
    """Of the server, tried on the first seed; empty: the one that was best for `server_of`."""
    server_of: str = "frozen"
    """The row whose server rate this one takes over."""
    one_rate: bool = False
    """Both halves have the client's rate."""


@dataclass(frozen=True)
class Study:
    """A table: rows over one config."""

    config: Path
    summaries: Path
    """Where the summaries stand, one JSON file per run."""
    runs: Path
    """Where the runs' own folders go."""
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]

    def run(self) -> dict[str, list[dict]]:
        """Every row's chosen runs, one per seed; two rows at a time."""
        self.summaries.mkdir(parents=True, exist_ok=True)
        found: dict[str, list[dict]] = {}
        with ThreadPoolExecutor(2) as pool:
            for row in self.rows:
                if row.server_rates:
                    found[row.name] = self._row(row, None, pool)
            rest = [row for row in self.rows if not row.server_rates]
            servers = {row.name: found[row.server_of][0]["server_rate"] for row in rest}
            jobs = {row.name: pool.submit(self._row, row, servers[row.name]) for row in rest}
            found |= {name: job.result() for name, job in jobs.items()}
        return {row.name: found[row.name] for row in self.rows}

    def finished(self) -> dict[str, list[dict]]:
        """As `run`, of the rows that are there already; makes no run."""
        found: dict[str, list[dict]] = {}
        for row in self.rows:
            rates = [r for r in row.rates for _ in row.server_rates or (0.0,)]
            tries = [t for seed in self.seeds[:1] for t in self._kept(row, seed)]
            if len(tries) < len(rates):
                continue
            chosen = _rates(_best(tries))
            of_seeds = [t for seed in self.seeds for t in self._kept(row, seed) if _rates(t) == chosen]
            if len(of_seeds) == len(self.seeds):
                found[row.name] = of_seeds
        return found

    def _kept(self, row: Row, seed: int) -> list[dict]:
        name = re.compile(rf"{re.escape(row.name)}-[\d.e-]+-[\d.e-]+-seed{seed}")
        files = sorted(self.summaries.glob("*.json"))
        return [json.loads(file.read_text()) for file in files if name.fullmatch(file.stem)]

    def _row(self, row: Row, server_rate: float | None, pool: ThreadPoolExecutor | None = None) -> list[dict]:
        each = pool.map if pool else map  # the rows that others wait for use both workers
        tries = [
            (rate, rate if row.one_rate else of_server, self.seeds[0])
            for rate in row.rates
            for of_server in row.server_rates or (server_rate or 0.0,)
        ]
        chosen = _best(list(each(lambda asked: self._one(row, *asked), tries)))
        again = [(*_rates(chosen), seed) for seed in self.seeds]
        return list(each(lambda asked: self._one(row, *asked), again))

    def _one(self, row: Row, rate: float, server_rate: float, seed: int) -> dict:
        """One `hosl train`, or its summary if it has been made."""
        name = f"{row.name}-{rate:g}-{server_rate:g}-seed{seed}"
        summary, folder = self.summaries / f"{name}.json", self.runs / name
        if summary.is_file():
            return json.loads(summary.read_text())
        words = [
            "train", str(self.config), "--json", "--seed", str(seed), "--output-dir", str(folder), *row.words,
            "--client.learning-rate", str(rate), "--server.learning-rate", str(server_rate),
        ]  # fmt: skip
        command = [sys.executable, "-c", "import sys; from hosl.cli import main; sys.exit(main())", *words]
        ran = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        if ran.returncode:
            said = ran.stderr.strip().splitlines()[-1]
            if not said.startswith("hosl:") or "finite" not in said:
                raise RuntimeError(f"{name} failed: {said}")
            # a rate so high that it diverges is a result of the search, not of the program
            found = {"failed": said, "dev_loss_nats": float("inf")}
        else:
            found = json.loads(ran.stdout) | {"dev_curve": _dev_curve(folder)}
        found |= {
            "rate": rate, "server_rate": server_rate, "seed": seed, "command": "hosl " + " ".join(words),
        }  # fmt: skip
        summary.write_text(json.dumps(found))
        print(name, f"dev loss {found['dev_loss_nats']:.4f}", flush=True)
        return found


def spread(values: list[float], digits: int) -> str:
    """Mean ± sd."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def gap_closure(runs: list[dict], frozen: list[dict], first: list[dict], key: str) -> str:
    """(method - frozen) / (FO - frozen), ratio of means over paired seeds, with its 95 % bootstrap interval.

    n/a where the gap is under 2 standard errors. Source: methods.md section 2.
    """
    of_gap = np.array([f[key] - z[key] for f, z in zip(first, frozen, strict=True)])
    of_row = np.array([r[key] - z[key] for r, z in zip(runs, frozen, strict=True)])
    if abs(of_gap.mean()) < 2 * of_gap.std(ddof=1) / len(of_gap) ** 0.5:
        return "n/a (gap not resolved)"
    closure = of_row.mean() / of_gap.mean() + 0.0
    seeds = np.random.Generator(np.random.Philox(0)).integers(0, len(of_gap), (10_000, len(of_gap)))
    low, high = np.quantile(of_row[seeds].mean(1) / of_gap[seeds].mean(1), (0.025, 0.975))
    return f"{closure:.2f} [{low:.2f}, {high:.2f}]".replace("-0.00", "0.00")


def _rates(run: dict) -> tuple[float, float]:
    return run["rate"], run["server_rate"]


def _best(tries: list[dict]) -> dict:
    """The try with the lowest dev loss."""
    return min(tries, key=lambda summary: summary["dev_loss_nats"])


def _dev_curve(folder: Path) -> list[list[float]]:
    """[step, loss in nats, accuracy] of every evaluation on dev."""
    lines = read_lines(folder / "metrics.jsonl")
    return [[m["step"], m["loss_nats"], m["accuracy"]] for m in lines if m.get("split") == "dev"]


def draw_curves(chosen: dict[str, list[dict]], title: str, file: Path) -> None:
    """Dev loss over steps, mean over seeds and a band of one sd, one line a row, the last values as labels; SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for place, (name, runs) in enumerate(chosen.items()):
        curves = np.array([[loss for _, loss, _ in run["dev_curve"]] for run in runs])
        steps = [step for step, _, _ in runs[0]["dev_curve"]]
        mean, sd = curves.mean(0), curves.std(0, ddof=1)
        style = {"frozen": ("0.4", "--"), "fo-fo-sgd": ("black", "-")}.get(name, (f"C{place % 10}", "-"))
        axes.plot(
            steps, mean, color=style[0], linestyle=style[1], label=f"{name}  {mean[-1]:.3f}", marker="."
        )
        axes.fill_between(steps, mean - sd, mean + sd, color=style[0], alpha=0.12, linewidth=0)
    axes.set(title=title, xlabel="step", ylabel="dev loss, nats", yscale="log")
    ticks = [
        t
        for t in (0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0)
        if axes.get_ylim()[0] < t < axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)
    axes.legend(title="row, and its last value", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
