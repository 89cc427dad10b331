"""How deep the returned gradient reaches: cosines of residual feedback with true gradients, by depth and cut.

    HOSL_DATA=... python research/residual_cosines.py [--picture FILE.svg]

SmolLM2-135M at cuts 10, 20, 28 and 30 (no block of the server above the cut) on 8 rows of SST-2 as prompts, and
MiniLM, whose norms stand on the stream, at cuts 4 and 6 on 8 docstrings. One batch, seed 0, untrained halves.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from hosl.config import parse_config
from hosl.training.alignment import first_batch_alignment

SST2 = {
    "kind": "prompts", "name": "SST-2", "folder": "$HOSL_DATA/data/tasks", "max_tokens": 64, "train_rows": 64,
    "dev_rows": 8,
}  # fmt: skip
CASES = {
    **{f"SmolLM2-135M, cut {cut} of 30": ("SmolLM2-135M", cut, SST2, 8) for cut in (10, 20, 28, 30)},
    **{
        f"MiniLM (post-LN), cut {cut} of 6": (
            "all-MiniLM-L6-v2",
            cut,
            {"kind": "docstrings", "max_tokens": 48},
            8,
        )
        for cut in (4, 6)
    },
}


def cosines(model: str, cut: int, task: dict, rows: int) -> list[tuple[int, str, float, float]]:
    """(blocks below the cut, layer, cosine, ratio) of every output projection of the client."""
    config = parse_config(
        {
            "method": "hosl-residual", "residual": {"blocks": "all"}, "model": {"name": model, "cut": cut},
            "task": task, "per_device_train_batch_size": rows, "output_dir": "runs/none",
        },
        where="residual_cosines",
    )  # fmt: skip
    found = []
    for row in first_batch_alignment(config):
        block = next(int(part) for part in row.layer.split(".") if part.isdigit())
        layer = "attention" if "att" in row.layer else "feed-forward"
        found.append((cut - block, layer, row.cosine, row.ratio))
    return found


def draw(found: dict[str, list[tuple[int, str, float, float]]], file: Path) -> None:
    """Cosine of the feed-forward's output projection over the depth below the cut, one line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.8), layout="constrained")
    looks: list[dict[str, Any]] = [
        {"color": "#9ecae1"}, {"color": "#4292c6"}, {"color": "#08519c"}, {"color": "#08519c", "linestyle": ":"},
        {"color": "#d2691e"}, {"color": "#d2691e", "linestyle": ":"},
    ]  # fmt: skip
    for (name, rows), look in zip(found.items(), looks, strict=True):
        line = [
            (depth, cosine) for depth, layer, cosine, _ in rows if layer == "feed-forward" and depth <= 20
        ]
        axes.plot(*zip(*line, strict=True), label=name, marker="o", markersize=3, **look)
    axes.set_xlabel("blocks below the cut")
    axes.set_ylabel("cosine with the true gradient")
    axes.set_ylim(0, 1.03)
    axes.set_xticks([1, 5, 10, 15, 20])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def main() -> None:
    """Print the table; on request, draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--json", type=Path, help="keep the figures, or draw those that are kept there")
    asked = parser.parse_args()
    if asked.json and asked.json.exists():
        found = json.loads(asked.json.read_text())
    else:
        found = {name: cosines(*case) for name, case in CASES.items()}
    for name, rows in found.items():
        print(name)
        for depth in sorted({row[0] for row in rows}):
            attention, feed_forward = (
                {r[1]: r for r in rows if r[0] == depth}[k] for k in ("attention", "feed-forward")
            )
            print(f"  {depth:3}  {attention[2]:5.2f} | {feed_forward[2]:5.2f}   ratio {feed_forward[3]:6.2f}")
    if asked.json and not asked.json.exists():
        asked.json.write_text(json.dumps(found))
    if asked.picture:
        draw(found, asked.picture)


if __name__ == "__main__":
    main()
