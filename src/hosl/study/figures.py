"""A study's pictures, SVG by matplotlib: dev loss over steps, accuracy against client memory."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hosl.study.config import Group, Study
from hosl.study.grid import Summary
from hosl.study.tables import gap_text

_TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)


def draw_study(
    study: Study, groups: list[Group], chosen: Mapping[str, list[Summary]], out: Path
) -> dict[str, list[Path]]:
    """Two pictures per group, below `out`; by the name of the group, nothing without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return {}
    drawn = {}
    for group in groups:
        runs = {name: chosen[row] for name, row in group.rows.items()}
        shown = {name: of for name, of in runs.items() if not any("diverged" in run for run in of)}
        files = [out / f"dev-loss-{group.name}.svg", out / f"memory-{group.name}.svg"]
        if shown:
            ends = (study.frozen, study.first_order)
            draw_curves(shown, group.name, files[0], *ends, labels=_labels(shown, *ends, "dev_loss_nats"))
            draw_memory(shown, group.name, files[1], *ends, labels=_labels(shown, *ends, "test_accuracy"))
            drawn[group.name] = files
    return drawn


def draw_curves(
    chosen: Mapping[str, list[Summary]],
    title: str,
    file: Path,
    frozen: str,
    first_order: str,
    *,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Dev loss over steps, mean over seeds and a band of one sd, one line a row, the last values as labels."""
    figure, axes = _axes((9.0, 5.0))
    for place, (name, runs) in enumerate(chosen.items()):
        curves = np.array([[loss for _, loss, _ in run["dev_curve"]] for run in runs])
        steps = [step for step, _, _ in runs[0]["dev_curve"]]
        mean = curves.mean(0)
        sd = curves.std(0, ddof=1) if len(runs) > 1 else np.zeros_like(mean)
        colour, line = _style(name, place, frozen, first_order)
        axes.plot(
            steps,
            mean,
            color=colour,
            linestyle=line,
            label=f"{(labels or {}).get(name, name)}  {mean[-1]:.3f}",
            marker=".",
        )
        axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.12, linewidth=0)
    axes.set(title=title, xlabel="step", ylabel="dev loss, nats", yscale="log")
    bottom, top = axes.get_ylim()
    ticks = [t for t in _TICKS if bottom < t < top]
    if len(ticks) > 1:
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.set_yticks([], minor=True)
    else:  # a narrow range: matplotlib's own, but as plain numbers
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend(title="row, and its last value", frameon=False, fontsize=8)
    save(figure, file)


def draw_memory(
    chosen: Mapping[str, list[Summary]],
    title: str,
    file: Path,
    frozen: str,
    first_order: str,
    *,
    labels: Mapping[str, str] | None = None,
) -> None:
    """Test accuracy against the client's peak memory, mean and one sd over seeds; up and to the left is better."""
    figure, axes = _axes((7.0, 5.0))
    for place, (name, runs) in enumerate(chosen.items()):
        accuracy = np.array([100 * run["test_accuracy"] for run in runs])
        peak_mib = max(run["client_peak_bytes"] for run in runs) / 2**20
        sd = accuracy.std(ddof=1) if len(runs) > 1 else 0.0
        colour, _ = _style(name, place, frozen, first_order)
        axes.errorbar(
            peak_mib,
            accuracy.mean(),
            yerr=sd,
            color=colour,
            marker="o",
            capsize=3,
            linestyle="",
            label=(labels or {}).get(name, name),
        )
    axes.set(title=title, xlabel="client peak, MiB of tensors", ylabel="test accuracy, %")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8)
    save(figure, file)


def _labels(shown: Mapping[str, list[Summary]], frozen: str, first_order: str, key: str) -> dict[str, str]:
    """Names with gap closure beside them: a picture that compares methods says how much of the gap they close."""
    if frozen not in shown or first_order not in shown:
        return {}
    found = {name: gap_text(runs, shown[frozen], shown[first_order], key) for name, runs in shown.items()}
    return {name: f"{name}  G {text.partition(' (')[0]}" for name, text in found.items()}


def _style(name: str, place: int, frozen: str, first_order: str) -> tuple[str, str]:
    return {frozen: ("0.4", "--"), first_order: ("black", "-")}.get(name, (f"C{place % 10}", "-"))


def _axes(inches: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def save(figure: Any, file: Path) -> None:
    """Write an SVG, and the folders above it."""
    import matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "hosl"}):  # the same figures give the same bytes
        figure.savefig(file, metadata={"Date": None})
