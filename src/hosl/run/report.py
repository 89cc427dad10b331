"""report.html: a run on one page, self-contained; opens from disk, prints, reads in dark and light.

Curves are drawn by matplotlib as inline SVG; where it is not installed the page says so and keeps its tables.
"""

import html
import io
import json
from pathlib import Path
from typing import Any

from hosl.run.record import read_lines

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
 :root {{ color-scheme: light dark; --ink: light-dark(#1d2733, #dfe6ee); --quiet: light-dark(#667485, #93a1b1);
   --line: light-dark(#d9e0e8, #36424f); --card: light-dark(#f6f8fa, #1b232c); --page: light-dark(#fff, #12181f); }}
 body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 60rem;
   margin: 2rem auto; padding: 0 1rem; }}
 h1 {{ font-size: 1.5rem; margin: 0 }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .5rem }}
 .quiet {{ color: var(--quiet) }}
 .cards {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0 }}
 .card {{ background: var(--card); border-radius: .5rem; padding: .7rem .9rem }}
 .card b {{ display: block; font-size: 1.3rem }}
 table {{ border-collapse: collapse; width: 100% }} td, th {{ text-align: left; padding: .25rem .6rem .25rem 0;
   border-bottom: 1px solid var(--line) }} .n {{ text-align: right; font-variant-numeric: tabular-nums }}
 svg {{ width: 100%; height: auto }} pre {{ background: var(--card); padding: .8rem; border-radius: .5rem;
   overflow-x: auto; font-size: .85rem }}
 @media print {{ body {{ max-width: none; margin: 0 }} }}
</style>
<h1>{title}</h1><p class="quiet">{subtitle}</p>
<div class="cards">{cards}</div>
<h2>Loss and accuracy</h2>{curves}
<h2>Where a step's time and bytes go</h2>{costs}
<h2>Dev evaluations</h2>{evaluations}
<h2>Again</h2><pre>{again}</pre>
<h2>Configuration</h2><pre>{config}</pre>
<h2>Record</h2><pre>{record}</pre>
</html>
"""

_COLOURS = {"loss": "#2f7ed8", "accuracy": "#e0702c", "quiet": "#8a97a6"}


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the files of the run; returns its path."""
    metrics, timings = read_lines(run / "metrics.jsonl"), read_lines(run / "timings.jsonl")
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    config = (run / "config.yaml").read_text(encoding="utf-8")
    steps = [line for line in metrics if "split" not in line]
    dev = [line for line in metrics if line.get("split") == "dev"]
    test = next((line for line in metrics if line.get("split") == "test"), None)
    page = _PAGE.format(
        title=html.escape(f"hosl run {run.name}"),
        subtitle=html.escape(_subtitle(record)),
        cards=_cards(steps, timings, test),
        curves=_curves(steps, dev),
        costs=_costs(steps, timings),
        evaluations=_table(dev, ("step", "accuracy", "f1_macro", "loss_nats")),
        again=html.escape(f"hosl train {run}/config.yaml\nhosl eval {run}\nhosl export {run} OUT"),
        config=html.escape(config),
        record=html.escape(json.dumps(record, indent=2)),
    )
    path = run / "report.html"
    partial = path.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.rename(path)
    return path


def _subtitle(record: dict[str, Any]) -> str:
    model, trained = record["model"], record["trained_parameters"]
    return f"{model['source']} ({model['family']}), cut at {record['cut']}; trained parameters: " + ", ".join(
        f"{side} {count:,}" for side, count in trained.items()
    )


def _cards(steps: list[dict[str, Any]], timings: list[dict[str, Any]], test: dict[str, Any] | None) -> str:
    shown = []
    if test:
        shown.append((f"{100 * test['accuracy']:.2f} %", "test accuracy"))
    if steps:
        shown.append((f"{steps[-1]['step']}", "steps"))
        shown.append((_mib(_mean(steps, "bytes_up")), "up per step"))
        shown.append((_mib(_mean(steps, "bytes_down")), "down per step"))
    if timings:
        shown.append((f"{_median(timings, 'step_s'):.2f} s", "median step"))
        shown.append((_mib(max(t["client_peak_bytes"] for t in timings)), "client peak (tensors)"))
        if any(t["server_peak_bytes"] for t in timings):  # a server elsewhere measures its own
            shown.append((_mib(max(t["server_peak_bytes"] for t in timings)), "server peak (tensors)"))
    return "".join(f'<div class="card"><b>{value}</b>{name}</div>' for value, name in shown)


def _curves(steps: list[dict[str, Any]], dev: list[dict[str, Any]]) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>No curves: matplotlib is not installed (<code>pip install 'hosl[report]'</code>).</p>"
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [s["step"] for s in steps], [s["loss_nats"] for s in steps], color=_COLOURS["loss"], lw=0.8, alpha=0.6
    )
    if dev:
        left.plot(
            [d["step"] for d in dev], [d["loss_nats"] for d in dev], "o-", color=_COLOURS["accuracy"], ms=3
        )
        right.plot(
            [d["step"] for d in dev], [d["accuracy"] for d in dev], "o-", color=_COLOURS["accuracy"], ms=3
        )
    left.set(xlabel="step", title="loss in nats: training (line), dev (points)")
    right.set(xlabel="step", title="dev accuracy")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_COLOURS["quiet"])
        axes.xaxis.label.set_color(_COLOURS["quiet"])
        axes.title.set_color(_COLOURS["quiet"])
        axes.title.set_fontsize(10)
        for spine in axes.spines.values():
            spine.set_color(_COLOURS["quiet"])
    drawing = io.StringIO()
    figure.savefig(drawing, format="svg", transparent=True)
    return drawing.getvalue()[drawing.getvalue().index("<svg") :]


def _costs(steps: list[dict[str, Any]], timings: list[dict[str, Any]]) -> str:
    if not (steps and timings):
        return "<p>No step was made.</p>"
    client_s, server_s, step_s = (_median(timings, key) for key in ("client_s", "server_s", "step_s"))
    rest_s = max(step_s - client_s - server_s, 0.0)
    parts = [("client", client_s, "#2f7ed8"), ("server", server_s, "#e0702c"), ("rest", rest_s, "#8a97a6")]
    total, place, bars = sum(s for _, s, _ in parts) or 1.0, 0.0, []
    for name, seconds, colour in parts:
        width = 100 * seconds / total
        bars.append(
            f'<rect x="{place:.2f}%" width="{width:.2f}%" height="26" fill="{colour}"><title>{name} {seconds:.3f} s'
            "</title></rect>"
        )
        place += width
    legend = ", ".join(f'<span style="color:{colour}">{name} {s:.3f} s</span>' for name, s, colour in parts)
    return f'<svg viewBox="0 0 900 26" preserveAspectRatio="none" height="26">{"".join(bars)}</svg><p>{legend}</p>'


def _table(lines: list[dict[str, Any]], keys: tuple[str, ...]) -> str:
    head = "".join(f'<th class="n">{key}</th>' for key in keys)
    rows = "".join(
        "<tr>" + "".join(f'<td class="n">{_number(line[key])}</td>' for key in keys) + "</tr>"
        for line in lines
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _number(value: int | float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _mib(size_bytes: int | float) -> str:
    return f"{size_bytes / 2**20:.2f} MiB" if size_bytes >= 2**17 else f"{size_bytes / 2**10:.2f} KiB"


def _mean(lines: list[dict[str, Any]], key: str) -> float:
    return sum(line[key] for line in lines) / len(lines)


def _median(lines: list[dict[str, Any]], key: str) -> float:
    return float(sorted(line[key] for line in lines)[len(lines) // 2])
