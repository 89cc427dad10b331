"""Figures of pages, studies and plans, drawn by matplotlib: curves, accuracy against memory, memory against cut.

Nothing is read and nothing decided here. A figure becomes inline SVG of a page (`inline`) or a file (`save`). Without
matplotlib, `can_draw` says so.
"""

import importlib.util
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from hosl.report.comparison import ACCURACY, Arm, accuracy_of
from hosl.report.groups import Group, PlannedLine
from hosl.report.labels import Label, room_for, spread_apart
from hosl.report.runs import Run
from hosl.report.style import Look, Looks, on_paper, with_variables

Curve: TypeAlias = tuple[np.ndarray, np.ndarray]
"""(steps, values of each run at them)."""

_INCHES = 9.0
_WIDTH = 72 * _INCHES * 0.92
"""Width of single axes, in points."""
_TICKS = 12
"""Steps between the least and the largest cut, at most."""
_STRETCHES = 30
"""Points of a training curve: means over so many stretches of steps."""
_MOST_STEPS = 3000
"""Steps of a run, at most, for each one's loss to be drawn behind them."""
_HEADROOM = 1.5
"""A loss axis ends at so many times the loss at the start: a run that diverges leaves the others readable."""


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def curves(groups: Sequence[Group], looks: Looks) -> Any:
    """Training loss, dev loss and dev accuracy over steps, mean and one sd over seeds; a row of axes per cut.

    Behind the means of a single run stands each step's loss.
    """
    cuts = sorted({group.cut for group in groups})
    runs = [run for group in groups for run in group.runs]
    with _style(looks):
        figure, axes = _axes(len(cuts), 3, 2.55)
        for group in groups:
            look, colour, row = looks[group.way], looks.colour(group.way), axes[cuts.index(group.cut)]
            if len(runs) == 1 and len(runs[0].steps) <= _MOST_STEPS:
                each = [step["step"] for step in runs[0].steps], [step["loss_nats"] for step in runs[0].steps]
                row[0].plot(*each, color=colour, linewidth=0.7, alpha=0.35)
            steps, losses = _training(group)
            row[0].plot(steps, losses.mean(0), color=colour, linestyle=look.line, linewidth=1.3)
            _band(row[1], _evaluations(group, "loss_nats"), look, colour)
            _band(row[2], _evaluations(group, "accuracy", 100.0), look, colour)
            if len(cuts) > 1:
                row[0].set_ylabel(f"cut {group.cut}", color=looks.paint("ink"), fontsize=10)
        reached = accuracy_of(runs[0].settings).heading.replace("test", "dev")
        for column, title in enumerate(("training loss, nats", "dev loss, nats", reached)):
            axes[0][column].set_title(title)
            axes[-1][column].set_xlabel("step")
        _limit_losses(axes, runs)
        return figure


def dev_losses(curves: Mapping[str, Curve], labels: Mapping[str, str], title: str, looks: Looks) -> Any:
    """Dev loss over steps on a logarithmic scale, mean and one sd over seeds; the last values stand in the legend."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    with _style(looks):
        figure, ((axes,),) = _axes(1, 1, 4.6)
        for way, (steps, losses) in curves.items():
            label = f"{labels.get(way, way)}   {losses[:, -1].mean():.3f}"
            _band(axes, (steps, losses), looks[way], looks.colour(way), label=label)
        axes.set(title=title, xlabel="step", ylabel="dev loss, nats", yscale="log")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        figure.legend(loc="outside right upper", title="arm, and its last value", frameon=False, fontsize=8)
        return figure


def accuracy_against_memory(arms: Sequence[Arm], looks: Looks, title: str = "") -> Any:
    """Mean test accuracy and one sd over seeds, at the client's peak memory; a thin line is the Pareto front."""
    measured = [arm for arm in arms if arm.costs.peak_bytes is not None and len(arm.numbers(ACCURACY))]
    unit, unit_bytes = _unit(max(arm.costs.peak_bytes or 0.0 for arm in measured))
    points = [
        ((arm.costs.peak_bytes or 0.0) / unit_bytes, float(arm.numbers(ACCURACY).mean())) for arm in measured
    ]
    labels = [Label(*xy, arm.label, looks.colour(arm.way)) for arm, xy in zip(measured, points, strict=True)]
    with _style(looks):
        figure, axes = _single_axes(4.2, title)
        front = _front(points)
        edge = max(room_for(labels, 0.0, _WIDTH), 1.05 * max(peak for peak, _ in points))
        axes.plot(
            [*(x for x, _ in front), edge], [*(y for _, y in front), front[-1][1]], drawstyle="steps-post",
            color=looks.paint("quiet"), linewidth=0.8, zorder=1,
        )  # fmt: skip
        for arm, xy in zip(measured, points, strict=True):
            values = arm.numbers(ACCURACY)
            axes.errorbar(
                *xy, yerr=values.std(ddof=1) if len(values) > 1 else None, color=looks.colour(arm.way),
                marker=looks[arm.way].marker, markersize=6.5, elinewidth=1.1, capsize=2.5, linestyle="", zorder=3,
            )  # fmt: skip
        axes.set_xlim(0, edge)
        axes.margins(y=0.12)
        axes.set(xlabel=f"client peak, {unit} of tensors", ylabel=accuracy_of(arms[0].settings).heading)
        _write(axes, labels, looks)
        return figure


def memory_against_cut(
    arms: Sequence[tuple[int, Arm]],
    lines: Sequence[PlannedLine],
    looks: Looks,
    *,
    quantity: str = "client peak, {} of tensors",
    limit_bytes: float | None = None,
    title: str = "",
) -> Any:
    """Memory over the cut: arms at their cut as points, planned lines, and the limit of a device."""
    points = [(cut, arm, arm.costs.peak_bytes or 0.0) for cut, arm in arms]
    planned = [size for line in lines for size in line.peak_bytes.values()]
    unit, unit_bytes = _unit(max([*planned, *(size for *_, size in points), limit_bytes or 0.0]))
    cuts = sorted({cut for line in lines for cut in line.peak_bytes} | {cut for cut, _ in arms})
    with _style(looks):
        figure, axes = _single_axes(3.9, title)
        ends = []
        for line in lines:
            sizes = [size / unit_bytes for size in line.peak_bytes.values()]
            colour = looks.colour(line.way)
            at = list(line.peak_bytes)
            axes.plot(at, sizes, color=colour, linestyle=looks[line.way].line, linewidth=1.4, zorder=2)
            ends.append(Label(float(at[-1]), sizes[-1], line.way, colour))
        for cut, arm, size in points:
            axes.plot(
                cut, size / unit_bytes, color=looks.colour(arm.way), marker=looks[arm.way].marker, markersize=7,
                markeredgecolor=looks.paint("page"), linestyle="", zorder=3,
            )  # fmt: skip
            if arm.way not in {line.way for line in lines}:
                ends.append(Label(float(cut), size / unit_bytes, arm.way, looks.colour(arm.way)))
        left = cuts[0] - 0.04 * max(cuts[-1] - cuts[0], 1)
        if limit_bytes is not None:
            axes.axhline(limit_bytes / unit_bytes, color=looks.paint("ink"), linestyle="--", linewidth=1)
            corner = left, limit_bytes / unit_bytes
            axes.annotate("the device's limit", corner, xytext=(6, 3), textcoords="offset points")
        axes.set_xlim(left, max(room_for(ends, left, _WIDTH), cuts[-1] + 0.04))
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        axes.set_xticks(range(cuts[0], cuts[-1] + 1, max(-(-(cuts[-1] - cuts[0]) // _TICKS), 1)))
        axes.set(xlabel="cut: blocks on the client", ylabel=quantity.format(unit))
        _write(axes, ends, looks)
        return figure


def save(figure: Any, file: Path, looks: Looks | None = None) -> None:
    """Write an SVG, or what the file's ending says, and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _style(looks or Looks({}, on_paper)):  # ticks are made only now
        figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def inline(figure: Any, name: str, title: str, looks: Looks) -> str:
    """The figure as an SVG element of a page: no header, no fonts of its own, ids that no other picture has."""
    drawing = io.StringIO()
    with _style(looks, svg_fonttype="none"):
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


def _training(group: Group) -> Curve:
    """Training losses of each run, as the means of equal stretches of steps."""
    lengths = [len(run.steps) for run in group.runs if run.steps]
    length = min(lengths, default=0)
    losses = np.array([[step["loss_nats"] for step in run.steps[:length]] for run in group.runs if run.steps])
    if not length:
        return np.zeros(0), np.zeros((1, 0))
    edges = np.linspace(0, length, min(_STRETCHES, length) + 1).astype(int)
    steps = [step["step"] for step in next(run.steps for run in group.runs if run.steps)[:length]]
    stretches = list(itertools.pairwise(edges))
    middles = np.array([np.mean(steps[begin:end]) for begin, end in stretches])
    return middles, np.stack([losses[:, begin:end].mean(1) for begin, end in stretches], axis=1)


def _evaluations(group: Group, key: str, scale: float = 1.0) -> Curve:
    """Values on dev of each run, at the steps at which all its runs were evaluated."""
    by_run = [{line["step"]: scale * line[key] for line in run.dev} for run in group.runs if run.dev]
    if not by_run:
        return np.zeros(0), np.zeros((0, 0))
    steps = sorted(set.intersection(*(set(run) for run in by_run)))
    return np.array(steps), np.array([[run[step] for step in steps] for run in by_run])


def _band(axes: Any, curve: Curve, look: Look, colour: str, *, label: str | None = None) -> None:
    steps, values = curve
    if not len(steps):
        return
    mean, line = values.mean(0), {"linestyle": look.line, "linewidth": 1.5}
    axes.plot(steps, mean, color=colour, marker=look.marker, markersize=3.6, label=label, **line)
    if len(values) > 1:
        sd = values.std(0, ddof=1)
        axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.13, linewidth=0)


def _limit_losses(axes: np.ndarray, runs: Sequence[Run]) -> None:
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


def _unit(most_bytes: float | int) -> tuple[str, int]:
    """Unit of an axis that ends there, and its bytes."""
    return ("GiB", 2**30) if most_bytes >= 2**31 else ("MiB", 2**20)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (memory, accuracy) for which no other has as much accuracy in less memory, or more in as much."""
    front: list[tuple[float, float]] = []
    for memory, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((memory, accuracy))
    return front


def _style(looks: Looks, **more: str) -> Any:
    """Settings of matplotlib while a figure is made and written; the same figures give the same bytes."""
    import matplotlib

    ink, quiet, line = looks.paint("ink"), looks.paint("quiet"), looks.paint("line")
    settings: dict[Any, Any] = {
        "text.parse_math": False, "font.size": 9, "text.color": ink, "axes.edgecolor": line, "axes.labelcolor": quiet,
        "axes.titlecolor": quiet, "axes.titlesize": 9.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": line, "grid.linewidth": 0.5, "xtick.color": line,
        "ytick.color": line, "xtick.labelcolor": quiet, "ytick.labelcolor": quiet, "lines.solid_capstyle": "round",
        "svg.hashsalt": "hosl", **{name.replace("_", "."): value for name, value in more.items()},
    }  # fmt: skip
    return matplotlib.rc_context(settings)


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


def _single_axes(height: float, title: str) -> tuple[Any, Any]:
    """Axes at a fixed place, so that labels know where they fall before anything is drawn."""
    from matplotlib.figure import Figure

    inches = height + (0.3 if title else 0.0)
    figure = Figure(figsize=(_INCHES, inches))
    axes = figure.add_axes((0.07, 0.5 / inches, 0.92, (height - 0.62) / inches))
    axes.set_title(title)
    return figure, axes


def _write(axes: Any, labels: Sequence[Label], looks: Looks) -> None:
    """Labels beside their points, apart from each other."""
    to_points = axes.transData.frozen() + axes.figure.dpi_scale_trans.inverted().frozen()
    spread = spread_apart(labels, lambda x, y: tuple(72 * float(v) for v in to_points.transform((x, y))))
    for label, lift in spread:
        axes.annotate(
            label.text, (label.x, label.y), xytext=(9, lift), textcoords="offset points", va="center",
            color=label.colour, fontsize=9,
            bbox={"facecolor": looks.paint("page"), "edgecolor": "none", "pad": 1},  # lines end before it
        )  # fmt: skip
