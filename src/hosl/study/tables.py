"""table.md and table.tex of a study: per group, methods x what they reach and cost, with spread, p and gap closure."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from hosl.config import parse_config
from hosl.report.runs import flat, same_work
from hosl.report.statistics import NoGap, gap_closure, mean_interval, p_floor, paired_p, spread
from hosl.study.config import Group, Study
from hosl.study.grid import Summary, run_name

Chosen = dict[str, list[Summary]]
"""Row of the grid -> its runs at the chosen rates, one per seed."""

_HEAD = (
    "method", "client rate", "server rate", "test accuracy, %", "p", "G (accuracy)", "test loss, nats", "p", "G (loss)",
    "client peak MiB", "up KiB/step", "down KiB/step", "s/step",
)  # fmt: skip
_OTHER_WORK = "n/a (other steps, batches or task)"


@dataclass(frozen=True)
class Table:
    """One group, as text in cells; Markdown and LaTeX are two ways to write it."""

    title: str
    head: tuple[str, ...]
    lines: list[tuple[str, ...]]
    commands: dict[str, str]
    """Method -> what makes its run with the first seed again."""


def write_tables(
    study: Study,
    groups: list[Group],
    chosen: Chosen,
    pictures: dict[str, list[Path]],
    out: Path,
    command: str,
) -> dict[str, str]:
    """Write table.md and table.tex below `out`; returns where they are.

    `command` is what makes the study; with `--run NAME` after it, one run.
    """
    tables = [group_table(study, group, chosen, command) for group in groups]
    note = caption(len(study.seeds), study)
    parts = [f"# {out.name}", note]
    for group, table in zip(groups, tables, strict=True):
        parts += [markdown(table), *(f"![{p.stem}]({p.name})" for p in pictures.get(group.name, []))]
    (out / "table.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    latex_tables = [latex(table, note) for table in tables]
    (out / "table.tex").write_text("\n".join(latex_tables), encoding="utf-8")
    return {"table": str(out / "table.md"), "latex": str(out / "table.tex")}


def caption(seeds: int, study: Study) -> str:
    """How the numbers were made; what a reader of one row must know."""
    tries = max(len(method.rates) for method in study.methods.values())
    server = (
        f"The server's rate: {len(study.server_learning_rates)} tried on {study.frozen}, the best then kept for all "
        "rows that have no single rate. "
        if study.server_learning_rates
        else ""
    )
    statistics = (
        f"Mean ± sd over {seeds} seeds [95 % interval of the mean, Student's t]. p: paired against {study.frozen}, "
        "two-sided sign-flip permutation test over seeds, never under "
        f"{p_floor(seeds):.2g} with so many "
        f"seeds. G: (method - {study.frozen}) / ({study.first_order} - {study.frozen}), ratio of means over paired "
        "seeds [95 % interval, delta method with Student's t]; n/a (gap not resolved): the gap is under two standard "
        "errors. "
        if seeds > 1
        else "One seed: no spread, no p, no gap closure. "
    )
    return (
        f"{statistics}"
        f"Client rates: {tries} per method tried on seed {study.seeds[0]}, the lowest dev loss chosen. {server}"
        "Test was read from the chosen runs only. Client peak: tensors of the client's half. s/step: median, on a "
        "machine that did other runs at the same time."
    )


def group_table(study: Study, group: Group, chosen: Chosen, command: str) -> Table:
    """The table of one group; `command` as in `write_tables`."""
    runs = {name: chosen[row] for name, row in group.rows.items()}
    frozen, first = runs[study.frozen], runs[study.first_order]
    lines = [_line(name, runs[name], frozen, first, len(study.seeds)) for name in study.methods]
    commands = {name: f"{command} --run {_name(of_row[0])}" for name, of_row in runs.items()}
    return Table(group.name, _HEAD, lines, commands)


def _name(run: Summary) -> str:
    return run_name(run["row"], run["rate"], run["server_rate"], run["seed"])


def of_seeds(runs: list[Summary], key: str) -> np.ndarray:
    """One number per seed."""
    return np.array([run[key] for run in runs], dtype=float)


def gap_text(runs: list[Summary], frozen: list[Summary], first: list[Summary], key: str) -> str:
    """G with its interval, or why there is none; `key` is of a loss, or of an accuracy."""
    if not _same_work(runs, frozen):
        return _OTHER_WORK
    if not _same_work(first, frozen):
        return "n/a (first-order: other steps, batches or task)"
    values = (of_seeds(of_row, key) for of_row in (runs, frozen, first))
    return str(gap_closure(*values, lower_is_better="loss" in key))


def spread_text(values: np.ndarray, digits: int) -> str:
    """Mean ± sd."""
    mean, sd = spread(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}"


def diverged(runs: list[Summary]) -> int:
    """How many of a row's runs have."""
    return sum("diverged" in run for run in runs)


def markdown(table: Table) -> str:
    """A heading, the table, and under it the commands."""
    rows = [table.head, ("---",) * len(table.head), *table.lines]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    commands = "\n".join(f"# {name}\n{command}" for name, command in table.commands.items())
    return (
        f"## {table.title}\n\n{text}\n\nOne cell again, with its first seed; the others' names end in their seeds:\n\n"
        f"```sh\n{commands}\n```"
    )


def latex(table: Table, note: str) -> str:
    """A `table` of plain LaTeX, no package needed."""
    rows = [table.head, *table.lines]
    body = [" & ".join(map(_escaped, row)) + r" \\" for row in rows]
    commands = "\n".join(f"% {name}: {command}" for name, command in table.commands.items())
    return "\n".join([
        commands,
        r"\begin{table}",
        rf"\caption{{{_escaped(table.title)}. {_escaped(note)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        r"\hline",
        body[0],
        r"\hline",
        *body[1:],
        r"\hline",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def _line(
    name: str, runs: list[Summary], frozen: list[Summary], first: list[Summary], seeds: int
) -> tuple[str, ...]:
    rates = (f"{runs[0]['rate']:g}", f"{runs[0]['server_rate']:g}")
    if diverged(runs):
        what = (
            "diverged at every rate"
            if len(runs) < seeds or seeds == 1
            else f"diverged on {diverged(runs)} of {seeds} seeds"
        )
        return (name, *rates, what, *("",) * (len(_HEAD) - 4))
    return (
        name,
        *rates,
        *_compared(runs, frozen, first, "test_accuracy", lambda values: 100 * values, 2),
        *_compared(runs, frozen, first, "test_loss_nats", lambda values: values, 4),
        f"{max(run['client_peak_bytes'] for run in runs) / 2**20:.1f}",
        f"{of_seeds(runs, 'bytes_up_per_step').mean() / 2**10:.1f}",
        f"{of_seeds(runs, 'bytes_down_per_step').mean() / 2**10:.3f}",
        f"{median(run['median_step_s'] for run in runs):.2f}",
    )


def _compared(
    runs: list[Summary],
    frozen: list[Summary],
    first: list[Summary],
    key: str,
    scaled: Callable[[Any], Any],
    digits: int,
) -> tuple[str, str, str]:
    """Value, p and G of one metric."""
    values = scaled(of_seeds(runs, key))
    low, high = mean_interval(values)
    value = (
        f"{spread_text(values, digits)} [{low:.{digits}f}, {high:.{digits}f}]"
        if len(values) > 1
        else f"{values[0]:.{digits}f}"
    )
    if diverged(frozen):
        return value, "n/a (frozen diverged)", "n/a (frozen diverged)"
    if len(values) < 2:
        return value, "", NoGap.ONE_SEED
    if not _same_work(runs, frozen):
        return value, _OTHER_WORK, _OTHER_WORK
    p = "" if runs is frozen else f"{paired_p(of_seeds(runs, key), of_seeds(frozen, key)):.3g}"
    if diverged(first):
        return value, p, "n/a (first-order diverged)"
    return value, p, gap_text(runs, frozen, first, key)


def _same_work(runs: list[Summary], others: list[Summary]) -> bool:
    """By their configs; summaries without one are of studies in which all rows do the same."""
    if "config" not in runs[0]:
        return True
    settings = (
        flat(msgspec.to_builtins(parse_config(of[0]["config"], where=of[0]["row"], warn=False)))
        for of in (runs, others)
    )
    return same_work(*settings)


def _escaped(text: str) -> str:
    for sign in ("\\", "&", "%", "_", "#", "{", "}"):
        text = text.replace(sign, r"\textbackslash " if sign == "\\" else f"\\{sign}")
    return text.replace("±", r"$\pm$")
