"""rate.csv, one line per cell, and rate.md: exponents with their intervals beside the theory's, and every point."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hosl.report.statistics import spread
from research.convergence_rate.config import RateStudy
from research.convergence_rate.fit import Axis, Line, two_terms

_COLUMNS = (
    "problem", "steps", "directions", "cut", "client_size", "scale", "learning_rate", "seed", "mean_square",
    "client_mean_square", "loss_start", "loss_end", "settings",
)  # fmt: skip


def write_rates(
    study: RateStudy,
    found: Sequence[Axis],
    lines: Sequence[Line],
    scales: Mapping[str, float],
    tried: Mapping[str, Sequence[Line]],
    out: Path,
) -> Path:
    """Write both files below `out`; returns the table's. By problem: `scales`, c that was chosen, and all `tried`."""
    with (out / "rate.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list[str](_COLUMNS), extrasaction="ignore")
        rows.writeheader()
        rows.writerows(lines)
    table = out / "rate.md"
    parts = [slope_table(found), _tuning_text(study, scales, tried), _terms_text(lines), point_table(found)]
    table.write_text("\n".join(parts), encoding="utf-8")
    return table


def slope_table(found: Sequence[Axis]) -> str:
    """One row per problem and axis."""
    rows = [
        "| problem | against | range | theory | fitted exponent | client's part alone | transient share |"
    ]
    rows += ["|---|---|---|---|---|---|---|"]
    for axis in found:
        slope, of_client = axis.slope(), axis.slope(axis.of_client)
        lost = int((~axis.finite).sum())
        note = f" ({lost} diverged)" if lost else ""
        share = np.mean(axis.transient[:, axis.finite], axis=0) if axis.finite.any() else np.array([np.nan])
        rows.append(
            f"| {axis.problem} | {axis.name} | {axis.x.min():g} to {axis.x.max():g}{note} | {axis.theory:+.1f} "
            f"| {slope or 'n/a'} | {of_client or 'n/a'} | {share.min():.2f} to {share.max():.2f} |"
        )
    return "\n".join(rows) + "\n"


def point_table(found: Sequence[Axis]) -> str:
    """Every point of every axis: mean and sd over seeds."""
    rows = [
        "| problem | against | value | average squared gradient norm | of it the client's | transient share |"
    ]
    rows += ["|---|---|---|---|---|---|"]
    for axis in found:
        for place, x in enumerate(axis.x):
            mean, sd = spread(axis.values[:, place])
            shown = f"{mean:.4g} ± {sd:.2g}" if axis.finite[place] else "diverged on a seed"
            share, transient = axis.of_client[:, place].mean() / mean, axis.transient[:, place].mean()
            rows.append(f"| {axis.problem} | {axis.name} | {x:g} | {shown} | {share:.2f} | {transient:.2f} |")
    return "\n".join(rows) + "\n"


def _tuning_text(study: RateStudy, scales: Mapping[str, float], tried: Mapping[str, Sequence[Line]]) -> str:
    """How c was chosen, problem by problem."""
    texts = []
    for name, lines in tried.items():
        middle, chosen = study.problems[name].middle, scales[name]
        values = [(line["scale"], line["mean_square"]) for line in lines]
        shown = ", ".join(f"{c:g}: {'diverged' if value is None else f'{value:.4g}'}" for c, value in values)
        texts.append(
            f"{name}: eta = c sqrt(Q / (d_c T)) for both halves; c = {chosen:g}, tuned once at T = {middle.steps}, "
            f"Q = {middle.directions}, cut {middle.cut}, seed {study.problems[name].seeds[0]} "
            f"(average by c: {shown}); {len(study.problems[name].seeds)} seeds.\n"
        )
    return "\n".join(texts)


def _terms_text(lines: Sequence[Line]) -> str:
    """The bound's form itself, fitted to each problem."""
    texts = []
    for name in dict.fromkeys(line["problem"] for line in lines):
        a, b, worst = two_terms([line for line in lines if line["problem"] == name])
        texts.append(
            f"{name}: all points by the bound's two terms, {a:.3g} / (eta T) + {b:.3g} eta (1 + (d_c + 1) / Q): "
            f"within {worst:.0%}.\n"
        )
    return "\n".join(texts)
