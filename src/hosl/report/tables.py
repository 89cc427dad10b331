"""The tables of a report: what groups of runs reach and cost, their evaluations, settings, versions, machines."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import msgspec
import numpy as np

from hosl.config import Config
from hosl.report.groups import Comparison, Group, differing
from hosl.report.html import amount, duration, facts_list, table
from hosl.report.runs import Ends, Run, flat, same_work, told
from hosl.report.statistics import NoGap, gap_closure, mean_interval, spread
from hosl.report.style import Look
from hosl.tasks import TaskConfig

_ENDS = ("frozen", "fo-fo")
"""Methods that are 0 and 1 of gap closure where no study names its rows."""
_NO_SEEDS = 2
"""Gap closure of fewer has no interval."""


def results(
    comparison: Comparison, looks: Mapping[str, Look], ends: Ends | None = None
) -> tuple[str, list[str]]:
    """A line per group; and what is 0 and what is 1 of gap closure, empty if it could be formed for none.

    `ends` are a study's own; without them these are the frozen and the fo-fo group.
    """
    gaps, zeros, ones = dict[str, tuple[str, str]](), dict[str, None](), dict[str, None]()
    for group in comparison.groups:
        zero, one = (_end(comparison, group, place, ends) for place in (0, 1))
        gaps[group.label] = (_gap(group, zero, one, "accuracy"), _gap(group, zero, one, "loss_nats"))
        if zero and one and gaps[group.label] != ("-", "-"):
            zeros[zero.way] = ones[one.way] = None
    with_gaps = bool(zeros)
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
    return table(head, rows, words=1), [" or ".join(ways) for ways in (zeros, ones)] if with_gaps else []


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
    heads = [html.escape(path) for path in paths]
    if len(paths) <= len(groups):
        return table(["", *heads], [[n, *row] for n, row in zip(names, values, strict=True)], words=99)
    turned = [[head, *column] for head, column in zip(heads, zip(*values, strict=True), strict=True)]
    return table(["", *names], turned, words=99)


def changed_settings(run: Run) -> str:
    """Settings that are not at their defaults."""
    config = run.config if run.parsed is None else msgspec.to_builtins(run.parsed)
    plain, here = _defaults(config["task"].get("kind")), flat(config)
    rows = [
        [html.escape(path), html.escape(told(value)), html.escape(told(plain[path])) if path in plain else ""]
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
    rows = [[html.escape(n), *(html.escape(str(facts.get(n, ""))) for facts, _ in found)] for n in names]
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


def _defaults(kind: str) -> dict[str, Any]:
    """Dotted path -> default; of the task's settings, those that its own kind has."""
    plain = msgspec.to_builtins(Config())
    for task in get_args(TaskConfig):
        if task.__struct_config__.tag == kind:
            fields = [f for f in msgspec.structs.fields(task) if f.default is not msgspec.NODEFAULT]
            plain["task"] = {"kind": plain["task"]["kind"]} | {f.encode_name: f.default for f in fields}
    return flat(plain)


def _end(comparison: Comparison, group: Group, place: int, ends: Ends | None) -> Group | None:
    """What is 0 (place 0) or 1 (place 1) of a group's gap closure, at the same cut and after the same work.

    A study says which; else it is the group of its method, of several the one with the lowest dev loss.
    """
    settings = group.runs[0].settings

    def is_end(other: Group) -> bool:
        if ends is None:
            return other.method == _ENDS[place]
        end = ends[group.runs[0].folder][place]
        return end is not None and other.runs[0].settings == end.settings

    found = [
        other
        for other in comparison.groups
        if is_end(other)
        and other.cut == group.cut
        and other.finished
        and same_work(settings, other.runs[0].settings)
    ]
    return min(found, key=_last_dev_loss, default=None)


def _last_dev_loss(group: Group) -> float:
    return float(np.mean([run.dev[-1]["loss_nats"] for run in group.finished.values() if run.dev]))


def _gap(group: Group, zero: Group | None, one: Group | None, key: str) -> str:
    if zero is None or one is None:
        return "-"
    by_seed = [of.tested(key) for of in (group, zero, one)]
    seeds = sorted(set.intersection(*(set(values) for values in by_seed)))
    if len(seeds) < _NO_SEEDS:
        return "-"
    found = gap_closure(
        *(np.array([values[seed] for seed in seeds]) for values in by_seed), lower_is_better=key != "accuracy"
    )
    value, _, interval = str(found).partition(" ")
    return f"{value}<small>{interval.strip('()') if isinstance(found, NoGap) else interval}</small>"


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
