"""The plan as a picture: memory against cut, a line for every way to train, the device's limit drawn in."""

from collections.abc import Sequence
from pathlib import Path

from hosl.errors import ConfigError
from hosl.planner.plan import PlanRow

_COLOURS = (
    "#8a97a6",
    "#2f7ed8",
    "#3aa0a0",
    "#2e9e5b",
    "#7fb8e6",
    "#8e6bc9",
    "#e8a33d",
    "#d9772b",
    "#c0392b",
    "#6b4a3a",
)


def draw_memory(rows: Sequence[PlanRow], limit_bytes: float | None, title: str, path: Path) -> None:
    """Write `path` (SVG, or what its ending says).

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ConfigError("--picture needs matplotlib: pip install 'hosl[report]'") from None

    usual = [row for row in rows if row.config.client.micro_batch_size is None]
    names = list(dict.fromkeys(row.name for row in usual))
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    for place, name in enumerate(names):
        of_name = [row for row in usual if row.name == name]
        sizes = [row.client_process_bytes / 2**30 for row in of_name]
        colour = _COLOURS[place % len(_COLOURS)]
        axes.plot([row.cut for row in of_name], sizes, marker="o", markersize=3, color=colour, label=name)
    if limit_bytes is not None:
        axes.axhline(limit_bytes / 2**30, color="#222222", linestyle="--", linewidth=1)
        place = (0.01, limit_bytes / 2**30)
        axes.annotate(
            "the device's limit", place, xycoords=("axes fraction", "data"), va="bottom", fontsize=9
        )
    axes.set(xlabel="blocks on the client", ylabel="client process, GiB", title=title)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    # no date and fixed ids: the same plan draws the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "hosl"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
