"""The pictures of a report, drawn by matplotlib as inline SVG: curves, accuracy against memory, memory against cut.

Nothing is read and nothing decided here. Without matplotlib, `can_draw` says so.
"""

import importlib.util
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hosl.report.groups import Comparison, Group, PlannedLine
from hosl.report.labels import Label, room_for, spread_apart
from hosl.report.style import Look, placeholder, with_variables

Looks = Mapping[str, Look]

_INCHES = 9.0
_WIDTH = 72 * _INCHES * 0.92
"""Of axes by themselves, in points."""
_TICKS = 12
"""Of cuts, at most so many steps between."""
_STRETCHES = 30
"""Of a training curve: its points are means over so many stretches of steps."""
_MOST_STEPS = 3000
"""Of a run, for each step's loss to be drawn behind them."""
_HEADROOM = 1.5
"""A loss axis ends at so many times the loss at the start: a run that diverges leaves the others readable."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(comparison: Comparison, looks: Looks, name: str) -> str:
    """Training loss, dev loss and dev accuracy over steps; a row of axes per cut, mean and one sd over seeds."""
    cuts = comparison.cuts
    with _style():
        figure, axes = _axes(len(cuts), 3, 2.55)
        for row, cut in zip(axes, cuts, strict=True):
            for group in [group for group in comparison.groups if group.cut == cut]:
                look = looks[group.way]
                steps, losses = _training(group)
                row[0].plot(
                    steps, losses.mean(0), color=placeholder(look.name), linestyle=look.line, linewidth=1.3
                )
                _band(row[1], _evaluations(group, "loss_nats"), look)
                _band(row[2], _evaluations(group, "accuracy", 100.0), look)
            if len(cuts) > 1:
                row[0].set_ylabel(f"cut {cut}", color=placeholder("ink"), fontsize=10)
        for place, title in enumerate(("training loss, nats", "dev loss, nats", "dev accuracy, %")):
            axes[0][place].set_title(title)
            axes[-1][place].set_xlabel("step")
        _limit_losses(axes, comparison)
        return _inline(figure, name, "Training loss, dev loss and dev accuracy over steps")


def run_curves(group: Group, looks: Looks, name: str) -> str:
    """Loss and dev accuracy of a single run over its steps: each step's loss behind its mean, evaluations as points."""
    look = looks[group.way]
    with _style():
        figure, ((left, right),) = _axes(1, 2, 3.0)
        steps = group.runs[0].steps
        if len(steps) <= _MOST_STEPS:
            each = [step["step"] for step in steps], [step["loss_nats"] for step in steps]
            left.plot(*each, color=placeholder(look.name), linewidth=0.7, alpha=0.35)
        at, losses = _training(group)
        left.plot(at, losses.mean(0), color=placeholder(look.name), linewidth=1.6)
        _band(left, _evaluations(group, "loss_nats"), Look("ink", (), "o"))
        _band(right, _evaluations(group, "accuracy", 100.0), Look("ink", (), "o"))
        left.set(title="loss, nats: training (coloured), dev (points)", xlabel="step")
        right.set(title="dev accuracy, %", xlabel="step")
        return _inline(figure, name, "Loss and dev accuracy over steps")


def accuracy_against_memory(comparison: Comparison, looks: Looks, name: str) -> str:
    """Mean test accuracy and one sd over seeds, at the client's peak memory; a thin line is the Pareto front."""
    points = [
        (group, *_accuracy(group), group.peak_bytes / 2**20)
        for group in comparison.groups
        if group.finished and group.timed
    ]
    labels = [Label(peak, mean, group.label, looks[group.way].name) for group, mean, _, peak in points]
    with _style():
        figure, axes = _one_axes(4.2)
        front = _front([(peak, mean) for _, mean, _, peak in points])
        edge = max(room_for(labels, 0.0, _WIDTH), 1.05 * max(peak for *_, peak in points))
        axes.plot(
            [*(x for x, _ in front), edge], [*(y for _, y in front), front[-1][1]], drawstyle="steps-post",
            color=placeholder("quiet"), linewidth=0.8, zorder=1,
        )  # fmt: skip
        for group, mean, sd, peak in points:
            look = looks[group.way]
            axes.errorbar(
                peak, mean, yerr=sd, color=placeholder(look.name), marker=look.marker, markersize=6.5,
                elinewidth=1.1, capsize=2.5, linestyle="", zorder=3,
            )  # fmt: skip
        axes.set_xlim(0, edge)
        axes.margins(y=0.12)
        axes.set(xlabel="client peak, MiB of tensors", ylabel="test accuracy, %")
        _write(axes, labels)
        return _inline(figure, name, "Test accuracy against client memory")


def memory_against_cut(
    groups: Sequence[Group], planned: Sequence[PlannedLine], looks: Looks, name: str
) -> str:
    """The client's peak over the cut: measured as points, planned as lines."""
    with _style():
        figure, axes = _one_axes(3.9)
        ends = []
        for line in planned:
            look = looks[line.way]
            cuts, sizes = list(line.peak_bytes), [size / 2**20 for size in line.peak_bytes.values()]
            axes.plot(cuts, sizes, color=placeholder(look.name), linestyle=look.line, linewidth=1.4, zorder=2)
            ends.append(Label(float(cuts[-1]), sizes[-1], line.way, look.name))
        for group in groups:
            look = looks[group.way]
            axes.plot(
                group.cut, group.peak_bytes / 2**20, color=placeholder(look.name), marker=look.marker, markersize=7,
                markeredgecolor=placeholder("page"), linestyle="", zorder=3,
            )  # fmt: skip
            if group.way not in {line.way for line in planned}:
                ends.append(Label(float(group.cut), group.peak_bytes / 2**20, group.way, look.name))
        cuts = sorted({cut for line in planned for cut in line.peak_bytes} | {group.cut for group in groups})
        left = cuts[0] - 0.04 * max(cuts[-1] - cuts[0], 1)
        axes.set_xlim(left, max(room_for(ends, left, _WIDTH), cuts[-1] + 0.04))
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        axes.set_xticks(range(cuts[0], cuts[-1] + 1, max(-(-(cuts[-1] - cuts[0]) // _TICKS), 1)))
        axes.set(xlabel="cut: blocks on the client", ylabel="client peak, MiB of tensors")
        _write(axes, ends)
        return _inline(figure, name, "Client memory against the cut")


def _training(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses of each run at them), the means of equal stretches of steps."""
    lengths = [len(run.steps) for run in group.runs if run.steps]
    length = min(lengths, default=0)
    losses = np.array([[step["loss_nats"] for step in run.steps[:length]] for run in group.runs if run.steps])
    if not length:
        return np.zeros(0), np.zeros((1, 0))
    edges = np.linspace(0, length, min(_STRETCHES, length) + 1).astype(int)
    steps = [step["step"] for step in next(run.steps for run in group.runs if run.steps)[:length]]
    stretches = list(itertools.pairwise(edges))
    at = np.array([np.mean(steps[begin:end]) for begin, end in stretches])
    return at, np.stack([losses[:, begin:end].mean(1) for begin, end in stretches], axis=1)


def _evaluations(group: Group, key: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values of each run at them): those steps at which all its runs were evaluated."""
    by_run = [{line["step"]: scale * line[key] for line in run.dev} for run in group.runs if run.dev]
    if not by_run:
        return np.zeros(0), np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(run) for run in by_run)))
    return np.array(steps), np.array([[run[step] for step in steps] for run in by_run])


def _band(axes: Any, curve: tuple[np.ndarray, np.ndarray], look: Look) -> None:
    steps, values = curve
    if not len(steps):
        return
    colour, mean = placeholder(look.name), values.mean(0)
    axes.plot(
        steps, mean, color=colour, linestyle=look.line, linewidth=1.5, marker=look.marker, markersize=3.6
    )
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.13, linewidth=0)


def _limit_losses(axes: np.ndarray, comparison: Comparison) -> None:
    runs = [run for group in comparison.groups for run in group.runs]
    at_start = max((run.steps[0]["loss_nats"] for run in runs if run.steps), default=0.0)
    # dev is first evaluated when a run may have diverged already: the least of them says what dev looks like
    first_dev = min((run.dev[0]["loss_nats"] for run in runs if run.dev), default=0.0)
    _limit(axes[:, 0], _HEADROOM * at_start)
    _limit(axes[:, 1], _HEADROOM * max(at_start, first_dev))


def _limit(column: np.ndarray, limit: float) -> None:
    """End axes that share their y at `limit`, unless it lies above all curves anyway, or below them."""
    bottom, top = column[0].get_ylim()
    bottom, lowest = max(bottom, 0.0), min(one.dataLim.y0 for one in column)
    column[0].set_ylim(bottom, limit if max(bottom, lowest) < limit < top else top)


def _accuracy(group: Group) -> tuple[float, float | None]:
    values = 100 * np.array(list(group.tested("accuracy").values()))
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else None


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (memory, accuracy) for which no other has as much accuracy in less memory, or more in as much."""
    found: list[tuple[float, float]] = []
    for memory, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((memory, accuracy))
    return found


def _style() -> Any:
    import matplotlib

    ink, quiet, line = placeholder("ink"), placeholder("quiet"), placeholder("line")
    return matplotlib.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "hosl", "text.parse_math": False, "font.size": 9, "text.color": ink,
        "axes.edgecolor": line, "axes.labelcolor": quiet, "axes.titlecolor": quiet, "axes.titlesize": 9.5,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": line, "grid.linewidth": 0.5, "xtick.color": line, "ytick.color": line,
        "xtick.labelcolor": quiet, "ytick.labelcolor": quiet, "lines.solid_capstyle": "round",
    })  # fmt: skip


def _axes(rows: int, columns: int, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(_INCHES, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="col", sharex=True)
    for one in axes.flat:
        one.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        one.yaxis.set_major_locator(MaxNLocator(5))
        one.tick_params(labelleft=True)
    return figure, axes


def _one_axes(height: float) -> tuple[Any, Any]:
    """A single pair of axes at a fixed place, so that labels know where they fall before anything is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES, height))
    return figure, figure.add_axes((0.07, 0.5 / height, 0.92, 1 - 0.62 / height))


def _write(axes: Any, labels: Sequence[Label]) -> None:
    """Labels beside their points, apart from each other."""
    to_points = axes.transData.frozen() + axes.figure.dpi_scale_trans.inverted().frozen()
    placed = spread_apart(labels, lambda x, y: tuple(72 * float(v) for v in to_points.transform((x, y))))
    for label, lift in placed:
        axes.annotate(
            label.text, (label.x, label.y), xytext=(9, lift), textcoords="offset points", va="center",
            color=placeholder(label.colour), fontsize=9,
            bbox={"facecolor": placeholder("page"), "edgecolor": "none", "pad": 1},  # lines end before it
        )  # fmt: skip


def _inline(figure: Any, name: str, title: str) -> str:
    """The figure as an SVG element of a page: no header, no fonts of its own, ids that no other picture has."""
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    svg = drawing.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    used = set(re.findall(r"#([\w.-]+)\)|href=\"#([\w.-]+)\"", svg))
    named = {one or other for one, other in used}
    svg = re.sub(r' id="([\w.-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in named else "", svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = re.sub(
        r"<svg [^>]*?viewBox=\"([^\"]*)\"[^>]*>", rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg
    )
    return with_variables(re.sub(r"\n\s*", "\n", svg))
