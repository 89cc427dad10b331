"""Tables and figures of a study, by group: its summaries as arms of a comparison, in table.md, table.tex and SVG."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from hosl.config import flat, parse_config
from hosl.report import figures, text
from hosl.report.comparison import ACCURACY, DEV_LOSS, LOSS, Arm, Comparison, Costs, Metric, Row
from hosl.report.render import rendered
from hosl.report.style import looks, on_paper
from hosl.report.tables import compared
from hosl.study.config import Group, Study
from hosl.study.grid import Summary, run_name

Chosen = dict[str, list[Summary]]
"""Arm of the grid -> its runs at the chosen rates, one per seed."""


def write_tables(
    study: Study, groups: list[Group], chosen: Chosen, out: Path, command: str
) -> dict[str, str]:
    """Write table.md and table.tex below `out`, and figures where matplotlib is there; returns where the tables are.

    `command` is what makes the study; with `--run NAME` after it, one run.
    """
    comparisons = [group_comparison(study, group, chosen) for group in groups]
    parts = [
        {
            "title": group.name, "table": compared(comparison),
            "pictures": _write_figures(comparison, group, chosen, out),
            "commands": {name: f"{command} --run {_name(chosen[arm][0])}" for name, arm in group.arms.items()},
        }
        for group, comparison in zip(groups, comparisons, strict=True)
    ]  # fmt: skip
    content = {"title": out.name, "note": caption(study, comparisons), "parts": parts}
    files = {"table": out / "table.md", "latex": out / "table.tex"}
    for file in files.values():
        file.write_text(rendered(f"{file.name}.jinja", **content), encoding="utf-8")
    return {name: str(file) for name, file in files.items()}


def group_comparison(study: Study, group: Group, chosen: Chosen) -> Comparison:
    """The arms of a group, every one beside the frozen and the first-order one."""
    arms = {name: study_arm(name, chosen[arm], len(study.seeds)) for name, arm in group.arms.items()}
    return Comparison([Row(arm, arms[study.frozen], arms[study.first_order]) for arm in arms.values()])


def study_arm(name: str, runs: list[Summary], seeds: int = 1) -> Arm:
    """Summaries of one arm, one per seed; those of an earlier version do not say their seeds, nor their settings."""
    config = runs[0].get("config")
    method = config["method"] if config else name
    settings = flat(msgspec.to_builtins(parse_config(config, where=name, warn=False))) if config else None
    rates = {"client rate": runs[0]["rate"], "server rate": runs[0]["server_rate"]}
    details = {heading: (f"{rate:g}", "") for heading, rate in rates.items()}
    diverged = sum("diverged" in run for run in runs)
    if diverged:
        everywhere = len(runs) < seeds or seeds == 1
        said = "diverged at every rate" if everywhere else f"diverged on {diverged} of {seeds} seeds"
        return Arm(name, name, method, settings, {}, Costs(None, 0, 0, None), details, said)
    values = {
        metric.key: {run.get("seed", number): run[metric.key] for number, run in enumerate(runs)}
        for metric in (ACCURACY, LOSS, DEV_LOSS)
        if metric.key in runs[0]
    }
    costs = Costs(
        max(run["client_peak_bytes"] for run in runs),
        float(of_seeds(runs, "bytes_up_per_step").mean()),
        float(of_seeds(runs, "bytes_down_per_step").mean()),
        median(run["median_step_s"] for run in runs),
    )
    return Arm(name, name, method, settings, values, costs, details)


def caption(study: Study, comparisons: Sequence[Comparison]) -> str:
    """Note on how the numbers were made; what a reader of one row must know."""
    tries = max(len(method.rates) for method in study.methods.values())
    sentences = [
        max(map(text.statistics_note, comparisons), key=len),  # that of a group which lacks nothing
        f"Client rates: {tries} per method tried on seed {study.seeds[0]}, the lowest dev loss chosen.",
        f"The server's rate: {len(study.server_learning_rates)} tried on {study.frozen}, the best then kept for all "
        "rows that have no single rate."
        if study.server_learning_rates
        else "",
        "Test was read from the chosen runs only. Client peak: tensors of the client's half. Steps were timed on a "
        "machine that did other runs at the same time.",
    ]
    return " ".join(filter(None, sentences))


def label_with_gap(row: Row, metric: Metric) -> str:
    """Label of an arm in a figure: one that compares methods says how much of the gap they close."""
    return f"{row.arm.label}  G {str(row.measure(metric).gap).partition(' (')[0]}"


def dev_curve(runs: list[Summary]) -> figures.Curve:
    """Dev losses of an arm's runs at the steps of their evaluations."""
    losses = np.array([[loss for _, loss, _ in run["dev_curve"]] for run in runs])
    return np.array([step for step, _, _ in runs[0]["dev_curve"]]), losses


def of_seeds(runs: list[Summary], key: str) -> np.ndarray:
    """One number per seed."""
    return np.array([run[key] for run in runs], dtype=float)


def _write_figures(comparison: Comparison, group: Group, chosen: Chosen, out: Path) -> list[Path]:
    """Two figures below `out`, of the arms that have not diverged; none without matplotlib."""
    shown = [row for row in comparison.rows if not row.arm.diverged]
    if not shown or not figures.can_draw():
        return []
    files = [out / f"dev-loss-{group.name}.svg", out / f"memory-{group.name}.svg"]
    curves = {row.arm.label: dev_curve(chosen[group.arms[row.arm.label]]) for row in shown}
    way_looks = looks({row.arm.way: row.arm.method for row in shown}, on_paper)
    labels = {row.arm.way: label_with_gap(row, DEV_LOSS) for row in shown}
    figures.save(figures.dev_losses(curves, labels, group.name, way_looks), files[0], way_looks)
    arms = [replace(row.arm, label=label_with_gap(row, ACCURACY)) for row in shown]
    figures.save(figures.accuracy_against_memory(arms, way_looks, group.name), files[1], way_looks)
    return files


def _name(run: Summary) -> str:
    return run_name(run["row"], run["rate"], run["server_rate"], run["seed"])
