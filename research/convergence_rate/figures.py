"""rate.svg: three log-log panels, the theory's slope as a dashed guide. Needs matplotlib; without it, no picture."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hosl.report.figures import save
from research.convergence_rate.config import THEORY, AxisName
from research.convergence_rate.fit import Axis

_PANELS: tuple[tuple[AxisName, str], ...] = (
    ("T", "steps T"),
    ("Q", "directions Q"),
    ("d_c", "client's parameters d_c"),
)
_CHECK: AxisName = "Q at constant QT"


def draw_rates(found: Sequence[Axis], file: Path) -> None:
    """Every problem relative to the middle of its grid, so that one guide serves all of them."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.0, 5.4), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    names = list(dict.fromkeys(axis.problem for axis in found))
    for panel, (name, label) in zip(panels, _PANELS, strict=True):
        for axis in found:
            colour = f"C{names.index(axis.problem)}"
            if axis.name == name:
                _line(panel, axis, f"{axis.problem}  {axis.slope()}", color=colour, marker="o")
            elif axis.name == _CHECK and name == "Q":
                _line(
                    panel, axis, f"{axis.problem}, QT constant  {axis.slope()}", color=colour, marker="o",
                    markerfacecolor="white", linewidth=0.8, linestyle=":",
                )  # fmt: skip
        _guide(panel, name, found)
        panel.set(xscale="log", yscale="log", title=f"against {label}", xlabel=f"{label}, over the middle's")
        _plain_ticks(panel.xaxis)
        _plain_ticks(panel.yaxis)
        panel.grid(alpha=0.3, which="both")
        panel.legend(
            frameon=False, fontsize=8, title="exponent [95 %]", title_fontsize=8,
            loc="upper center", bbox_to_anchor=(0.5, -0.14),
        )  # fmt: skip
    panels[0].set_ylabel("average |grad f|², over the middle's")
    save(figure, file)


def _line(panel: Any, axis: Axis, label: str, **style: Any) -> None:
    """Means over seeds, and one standard error."""
    mean = axis.values.mean(0)
    error = (
        axis.values.std(0, ddof=1) / len(axis.values) ** 0.5 if len(axis.values) > 1 else np.zeros_like(mean)
    )
    scale = mean[axis.middle]
    panel.errorbar(
        axis.x / axis.x[axis.middle], mean / scale, yerr=error / scale, capsize=2, markersize=4, label=label, **style
    )  # fmt: skip


def _guide(panel: Any, name: AxisName, found: Sequence[Axis]) -> None:
    """The predicted slope through the middle, over the panel's range."""
    ratios = [axis.x / axis.x[axis.middle] for axis in found if axis.name == name]
    if ratios:
        ends = np.array([min(r.min() for r in ratios), max(r.max() for r in ratios)])
        panel.plot(
            ends,
            ends ** THEORY[name],
            color="0.4",
            linestyle="--",
            label=f"theory  {THEORY[name]:+.1f}",
            zorder=1,
        )


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(base=2))
    axis.set_major_formatter("{x:.3g}")
    axis.set_minor_formatter(NullFormatter())
