"""Tables of cells: a comparison, evaluations, settings, versions. Templates write them as HTML, Markdown or LaTeX."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import msgspec
import numpy as np

from hosl.config import Config, flat
from hosl.evaluation import by_class
from hosl.report.comparison import Comparison, Metric, Row, learns_texts
from hosl.report.groups import Group, differing
from hosl.report.runs import Run, setting_text
from hosl.report.style import Look
from hosl.system.readable import readable_bytes, readable_seconds
from hosl.tasks import TaskConfig

_CONFUSION_COLUMNS = 12
"""Classes up to which the confusion matrix is shown whole."""


@dataclass(frozen=True)
class Cell:
    """Text, and a smaller one behind it."""

    text: str
    aside: str = ""
    look: Look | None = None
    """Sample of a line to stand before the text."""


@dataclass(frozen=True)
class Table:
    """Lines of cells below a head."""

    head: Sequence[str]
    lines: Sequence[Sequence[Cell]] = field(default_factory=list)
    text_columns: int = 1
    """Columns from the left that hold text; the others hold numbers."""


def compared(
    comparison: Comparison, looks: Mapping[str, Look] | None = None, heading: str = "method"
) -> Table:
    """A line per row; without p and gap closure where all rows lack them for one reason."""
    details = list(dict.fromkeys(name for row in comparison.rows for name in row.arm.details))
    head = [heading, *details]
    beside = comparison.has_columns
    for metric in comparison.metrics:
        head += [metric.heading, *(["p", metric.gap_heading] if beside else [])]
    head += ["client peak", "bytes of a step", "median step"]
    lines = []
    for row in comparison.rows:
        arm = row.arm
        line = [
            Cell(arm.way, look=(looks or {}).get(arm.way)),
            *(Cell(*arm.details[name]) for name in details),
        ]
        if arm.diverged:
            line += [Cell(arm.diverged)]
            line += [Cell("")] * (len(head) - len(line))
        else:
            line += [
                cell for metric in comparison.metrics for cell in _measure(row, metric, beside=beside)
            ] + _costs(row)
        lines.append(line)
    return Table(head, lines)


def evaluations(groups: Sequence[Group]) -> Table:
    """Every evaluation on dev, and the one on test; means over seeds."""
    texts = any(learns_texts(group.runs[0].settings) for group in groups)
    second = ("perplexity", 1.0, 3) if texts else ("f1_macro", 100.0, 2)
    lines = []
    for group in groups:
        steps = sorted({line["step"] for run in group.runs for line in run.dev})
        splits = [
            ("dev", [line for run in group.runs for line in run.dev if line["step"] == s]) for s in steps
        ]
        splits.append(("test", [run.test for run in group.finished.values() if run.test]))
        lines += [
            _texts([
                group.label, str(of_step[0]["step"]), f"{split}, {of_step[0]['examples']}", str(len(of_step)),
                _mean(of_step, "accuracy", 100.0, 2), _mean(of_step, *second), _mean(of_step, "loss_nats", 1.0, 4),
            ])
            for split, of_step in splits
            if of_step
        ]  # fmt: skip
    scores = ["tokens right, %", "perplexity"] if texts else ["accuracy, %", "macro F1, %"]
    head = ["run", "step", "rows of", "n", *scores, "loss, nats"]
    if len(groups) == 1 and len(groups[0].runs) == 1:  # its label and number say nothing
        kept = [number for number, name in enumerate(head) if name not in ("run", "n")]
        return Table(
            [head[number] for number in kept], [[line[number] for number in kept] for line in lines], 2
        )
    return Table(head, lines)


def classes(run: Run) -> Table:
    """Scores of every class on test, and its row of the confusion matrix: whole where it has few columns."""
    if run.classes is None:
        return Table([])
    labels, confusion = run.classes["labels"], np.array(run.classes["confusion"], dtype=np.int64)
    head = ["class", "precision, %", "recall, %", "F1, %", "rows"]
    whole = len(labels) <= _CONFUSION_COLUMNS
    head += [f"taken for {label}" for label in labels] if whole else ["taken most for"]
    lines = []
    for row, counts in zip(by_class(labels, confusion), confusion, strict=True):
        scores = [f"{100 * row[name]:.1f}" for name in ("precision", "recall", "f1")]
        most = [f"{labels[i]} {counts[i]}" for i in np.argsort(-counts, kind="stable")[:3] if counts[i]]
        cells = [str(count) for count in counts] if whole else [", ".join(most)]
        lines.append(_texts([row["label"], *scores, str(row["support"]), *cells]))
    return Table(head, lines)


def differences(groups: Sequence[Group]) -> Table:
    """The settings in which groups differ; fewer columns than lines, whichever way that is."""
    paths = [
        path for path in differing(groups) if path not in ("method", "model.cut")
    ]  # the labels have these
    if not paths:
        return Table([])
    values = [[setting_text(group.runs[0].settings.get(path)) for path in paths] for group in groups]
    names = [group.label for group in groups]
    if len(paths) > len(groups):
        names, paths, values = paths, names, [list(column) for column in zip(*values, strict=True)]
    lines = [_texts([name, *row]) for name, row in zip(names, values, strict=True)]
    return Table(["", *paths], lines, text_columns=99)


def changed_settings(run: Run) -> Table:
    """Settings that are not at their defaults."""
    config = run.config if run.parsed is None else msgspec.to_builtins(run.parsed)
    plain, here = _defaults(config["task"].get("kind")), flat(config)
    lines = [
        _texts([path, setting_text(value), setting_text(plain[path]) if path in plain else ""])
        for path, value in here.items()
        if path != "output_dir" and (path not in plain or plain[path] != value)
    ]
    return Table(["setting", "here", "default"], lines, text_columns=99)


def versions(runs: Sequence[Run]) -> Table:
    """Versions and machines: a line for each fact, a column for each kind of run."""
    kinds: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        facts = {**run.record["versions"], **run.record.get("machine", {})}
        if "system" in facts:
            facts.pop("machine", None)
        kinds.setdefault(json.dumps(facts, sort_keys=True), (facts, []))[1].append(run)
    names = dict.fromkeys(name for facts, _ in kinds.values() for name in facts)
    lines = [_texts([name, *(str(facts.get(name, "")) for facts, _ in kinds.values())]) for name in names]
    return Table(["", *(f"{len(same)} runs" for _, same in kinds.values())], lines, text_columns=99)


def machine(runs: Sequence[Run]) -> str:
    """Processor, cores and threads on which seconds were measured."""
    machines = []
    for run in runs:
        facts = run.record.get("machine", {})
        parts = [
            str(facts.get("processor") or facts.get("system") or run.record["versions"].get("machine", "?"))
        ]
        parts += [
            f"{facts[unit]} {unit if facts[unit] > 1 else unit[:-1]}"
            for unit in ("cores", "threads")
            if unit in facts
        ]
        machines.append(", ".join(parts))
    return "; ".join(dict.fromkeys(machines))


def _defaults(kind: str) -> dict[str, Any]:
    """Dotted path -> default; those of the task's settings that its own kind has."""
    plain = msgspec.to_builtins(Config())
    for task in get_args(TaskConfig):
        if task.__struct_config__.tag == kind:
            fields = [f for f in msgspec.structs.fields(task) if f.default is not msgspec.NODEFAULT]
            plain["task"] = {"kind": plain["task"]["kind"]} | {f.encode_name: f.default for f in fields}
    return flat(plain)


def _measure(row: Row, metric: Metric, *, beside: bool) -> list[Cell]:
    """Value, p and G of one metric."""
    measure = row.measure(metric)
    texts = [(measure.spread, measure.interval)]
    if beside:
        texts += [_parted(measure.p_text), _parted(str(measure.gap))]
    return [Cell(*text) for text in texts]


def _parted(text: str) -> tuple[str, str]:
    """The first word and the rest."""
    first, _, rest = text.partition(" ")
    return first, rest


def _costs(row: Row) -> list[Cell]:
    costs = row.arm.costs
    return [
        Cell("-" if costs.peak_bytes is None else readable_bytes(costs.peak_bytes)),
        Cell(
            f"{readable_bytes(costs.bytes_up)} up",
            f"and {readable_bytes(costs.bytes_down)} down"
            + (f"; all evaluations {readable_bytes(costs.eval_bytes_up)} up" if costs.eval_bytes_up else ""),
        ),
        Cell("-" if costs.step_s is None else readable_seconds(costs.step_s)),
    ]


def _texts(texts: Sequence[str]) -> list[Cell]:
    return [Cell(text) for text in texts]


def _mean(lines: Sequence[Mapping[str, Any]], key: str, scale: float, digits: int) -> str:
    values = [scale * line[key] for line in lines if key in line]
    return f"{np.mean(values):.{digits}f}" if values else "-"
