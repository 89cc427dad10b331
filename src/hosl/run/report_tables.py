"""The tables of a report: what groups of runs reach and cost, their evaluations, settings, versions, machines."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from hosl.config import Config
from hosl.run.report_colours import Look
from hosl.run.report_groups import Comparison, Group, differing
from hosl.run.report_page import amount, duration, facts_list, table
from hosl.run.report_runs import Run, flat, told
from hosl.run.statistics import gap_closure, mean_interval, spread

_SAME_WORK = ("max_steps", "per_device_train_batch_size", "task.")
"""Settings that a method must share with the two ends for its gap closure to mean anything."""
_NO_SEEDS = 2
"""Gap closure of fewer has no interval."""


def results(comparison: Comparison, looks: Mapping[str, Look]) -> tuple[str, bool]:
    """A line per group; and whether gap closure could be formed for any."""
    gaps = {group.label: _gaps(comparison, group) for group in comparison.groups}
    with_gaps = any(cell != "-" for of_group in gaps.values() for cell in of_group)
    several = len(comparison.cuts) > 1
    head = ["way to train"] + (["cut"] if several else []) + ["seeds", "test accuracy, %", "test loss, nats"]
    head += (["G (accuracy)", "G (loss)"] if with_gaps else []) + [
        "client peak", "bytes of a step", "median step",
    ]  # fmt: skip
    rows = []
    for group in comparison.groups:
        row = [f'<span class="name">{looks[group.way].key()}{html.escape(group.way)}</span>']
        row += [str(group.cut)] if several else []
        row += [_seeds(group), _spread(group, "accuracy", 100.0, 2), _spread(group, "loss_nats", 1.0, 4)]
        row += list(gaps[group.label]) if with_gaps else []
        rows.append(row + _costs(group))
    return table(head, rows, words=1), with_gaps


def evaluations(groups: Sequence[Group]) -> str:
    """Every evaluation on dev, and the one on test; means over seeds."""
    head = ["run", "step", "rows of", "n", "accuracy, %", "macro F1, %", "loss, nats"]
    rows = []
    for group in groups:
        steps = sorted({line["step"] for run in group.runs for line in run.dev})
        lines = [
            ("dev", [line for run in group.runs for line in run.dev if line["step"] == s]) for s in steps
        ]
        lines.append(("test", [run.test for run in group.finished.values() if run.test]))
        for split, of_step in lines:
            if of_step:
                rows.append([
                    html.escape(group.label), str(of_step[0]["step"]), f"{split}, {of_step[0]['examples']}",
                    str(len(of_step)), _mean(of_step, "accuracy", 100.0, 2), _mean(of_step, "f1_macro", 100.0, 2),
                    _mean(of_step, "loss_nats", 1.0, 4),
                ])  # fmt: skip
    if len(groups) == 1 and len(groups[0].runs) == 1:  # then these two say nothing
        head, rows = [head[1], *head[2:3], *head[4:]], [[row[1], row[2], *row[4:]] for row in rows]
        return table(head, rows, words=2)
    return table(head, rows, words=1) if rows else ""


def differences(comparison: Comparison) -> str:
    """The settings in which groups differ; fewer columns than lines, whichever way that is."""
    groups = comparison.groups
    paths = [
        path for path in differing(groups) if path not in ("method", "model.cut")
    ]  # the labels have these
    values = [[html.escape(told(group.runs[0].settings.get(path))) for path in paths] for group in groups]
    names = [html.escape(group.label) for group in groups]
    if not paths:
        return ""
    if len(paths) <= len(groups):
        return table(["", *paths], [[n, *row] for n, row in zip(names, values, strict=True)], words=99)
    turned = [[path, *column] for path, column in zip(paths, zip(*values, strict=True), strict=True)]
    return table(["", *names], turned, words=99)


def changed_settings(run: Run) -> str:
    """Settings that are not at their defaults."""
    plain = flat(msgspec.to_builtins(Config()))
    here = flat(run.config if run.parsed is None else msgspec.to_builtins(run.parsed))
    rows = [
        [path, html.escape(told(value)), html.escape(told(plain[path])) if path in plain else ""]
        for path, value in here.items()
        if path != "output_dir" and (path not in plain or plain[path] != value)
    ]
    return table(["setting", "here", "default"], rows, words=99)


def versions(runs: Sequence[Run]) -> str:
    """Versions and machines; where there are several kinds, a column for each."""
    kinds: dict[str, tuple[dict[str, Any], int]] = {}
    for run in runs:
        facts = {**run.record["versions"], **run.record.get("machine", {})}
        if "system" in facts:
            facts.pop("machine", None)
        key = json.dumps(facts, sort_keys=True)
        kinds[key] = (facts, kinds.get(key, (facts, 0))[1] + 1)
    found = list(kinds.values())
    if len(found) == 1:
        return facts_list(found[0][0])
    names = list(dict.fromkeys(name for facts, _ in found for name in facts))
    rows = [[name, *(html.escape(str(facts.get(name, ""))) for facts, _ in found)] for name in names]
    return table(["", *(f"{count} runs" for _, count in found)], rows, words=99)


def machine(runs: Sequence[Run]) -> str:
    """What seconds were measured on, in words."""
    found = []
    for run in runs:
        facts = run.record.get("machine", {})
        words = [str(facts.get("processor") or facts.get("system") or run.record["versions"]["machine"])]
        words += [
            f"{facts[what]} {what if facts[what] > 1 else what[:-1]}"
            for what in ("cores", "threads")
            if what in facts
        ]
        found.append(", ".join(words))
    return "; ".join(dict.fromkeys(found))


def _gaps(comparison: Comparison, group: Group) -> tuple[str, str]:
    ends = [_end(comparison, group, method) for method in ("frozen", "fo-fo")]
    return _gap(group, ends, "accuracy"), _gap(group, ends, "loss_nats")


def _end(comparison: Comparison, group: Group, method: str) -> Group | None:
    """The group of a method at the same cut that did the same work; of several the one with the lowest dev loss."""
    settings = group.runs[0].settings
    found = [
        other
        for other in comparison.groups
        if (other.method, other.cut) == (method, group.cut)
        and other.finished
        and all(
            value == other.runs[0].settings.get(path)
            for path, value in settings.items()
            if path.startswith(_SAME_WORK)
        )
    ]
    return min(found, key=_last_dev_loss, default=None)


def _last_dev_loss(group: Group) -> float:
    return float(np.mean([run.dev[-1]["loss_nats"] for run in group.finished.values() if run.dev]))


def _gap(group: Group, ends: Sequence[Group | None], key: str) -> str:
    if None in ends:
        return "-"
    by_seed = [one.tested(key) for one in (group, *ends) if one]
    seeds = sorted(set.intersection(*(set(values) for values in by_seed)))
    if len(seeds) < _NO_SEEDS:
        return "-"
    found = gap_closure(*(np.array([values[seed] for seed in seeds]) for values in by_seed))
    if found is None:
        return "n/a<small>not resolved</small>"
    value, _, interval = str(found).partition(" ")
    return f"{value}<small>{interval}</small>"


def _seeds(group: Group) -> str:
    unfinished = len({run.seed for run in group.runs} - set(group.finished))
    count = str(len(group.finished))
    return f"{count}<small>{unfinished} unfinished</small>" if unfinished else count


def _spread(group: Group, key: str, scale: float, digits: int) -> str:
    values = scale * np.array(list(group.tested(key).values()))
    if not len(values):
        return "-"
    mean, sd = spread(values)
    if len(values) < 2:
        return f"{mean:.{digits}f}"
    low, high = mean_interval(values)
    return f"{mean:.{digits}f} ± {sd:.{digits}f}<small>[{low:.{digits}f}, {high:.{digits}f}]</small>"


def _mean(lines: Sequence[Mapping[str, Any]], key: str, scale: float, digits: int) -> str:
    values = [scale * line[key] for line in lines if key in line]
    return f"{np.mean(values):.{digits}f}" if values else "-"


def _costs(group: Group) -> list[str]:
    peak, step = (amount(group.peak_bytes), duration(group.median_step_s)) if group.timed else ("-", "-")
    up, down = (amount(group.bytes_per_step(way)) for way in ("up", "down"))
    return [peak, f"{up} up<small>{down} down</small>", step]
