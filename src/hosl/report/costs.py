"""Where a step's time and bytes go, as bars of plain HTML: the waterfall of a step, bytes up and down."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from hosl.report.groups import Group
from hosl.report.html import amount, duration
from hosl.report.style import Look

_CALLS = {
    ("client", "probes"): "probes", ("client", "probe_with_dropout"): "first probe",
    ("server", "loss_with_dropout"): "loss of the first probe", ("server", "losses"): "losses of the probes",
    ("client", "forward"): "forward", ("client", "forward_for_guides"): "forward, inputs of output projections kept",
    ("client", "forward_for_backward"): "forward, kept for backward",
    ("server", "states"): "forward to the head", ("server", "step"): "forward, backward, update",
    ("server", "step_with_dropout"): "forward, backward, update",
    ("server", "step_at_mean"): "forward, backward, update", ("server", "gradient"): "gradient",
    ("server", "probe"): "probes", ("server", "descend"): "update",
    ("client", "projections"): "probes, projected", ("client", "one_sided_projections"): "one-sided probes",
    ("client", "tangents"): "forward-mode probes", ("client", "guide"): "directions from the gradient",
    ("client", "slope"): "slopes of the output projections", ("client", "node_slopes"): "slopes of the tokens",
    ("client", "descend"): "update along directions", ("client", "descend_nodes"): "update of the queries",
    ("client", "descend_along"): "update of the output projections", ("client", "backward"): "backward, update",
}  # fmt: skip
"""What every call of `hosl.core.rounds` does, in the order in which a step of any method begins them."""


@dataclass(frozen=True)
class Part:
    """A stretch of a step."""

    party: str
    """client, server, wire or rest."""
    name: str
    seconds: float


def step_parts(group: Group) -> list[Part]:
    """Medians over the steps of all runs, each call on its own, in the order of a step."""
    lines = [line for run in group.runs for line in run.timings]
    found = []
    for party in ("client", "server"):
        calls = {(party, call): None for line in lines for call in line.get(f"{party}_calls_s", ())}
        for _, call in calls:
            times = [line[f"{party}_calls_s"].get(call, 0.0) for line in lines if f"{party}_calls_s" in line]
            found.append((party, call, median(times)))
        if not calls:  # a run of a version that did not tell calls apart
            found.append((party, "", _median(line[f"{party}_s"] for line in lines)))
    order = list(_CALLS)
    known = [part for part in found if part[:2] in _CALLS]
    known.sort(key=lambda part: order.index(part[:2]))
    parts = [Part(p, _CALLS[p, call], s) for p, call, s in known]
    parts += [Part(p, call.replace("_", " "), s) for p, call, s in found if (p, call) not in _CALLS]
    wire = [line["wire_s"] for line in lines if "wire_s" in line]
    if wire:
        parts.append(Part("wire", "sending, receiving, waiting for a turn", median(wire)))
    parts.append(Part("rest", "drawing the batch, bookkeeping", _median(_rest(line) for line in lines)))
    return parts


def waterfall(groups: Sequence[Group], looks: Mapping[str, Look]) -> str:
    """A step of each group, its parts one after the other, on one scale."""
    steps = [(group, step_parts(group)) for group in groups]
    longest = max((sum(part.seconds for part in parts) for _, parts in steps), default=0.0) or 1.0
    rows = []
    for group, parts in steps:
        total, begin = sum(part.seconds for part in parts) or 1.0, 0.0
        if len(steps) > 1:
            rows.append(_heading(group, looks, f"median step {duration(group.median_step_s)}"))
        for part in parts:
            rows.append(
                f'<tr><th><span class="party" style="color:var(--{part.party})">{part.party}</span> '
                f"{html.escape(part.name)}</th>"
                f"<td class=track>{_bar(begin / longest, part.seconds / longest, part.party)}</td>"
                f"<td class=n>{duration(part.seconds)}</td><td class=n>{_percent(part.seconds / total)}</td></tr>"
            )
            begin += part.seconds
    return f'<div class="wide"><table class="bars">{_bodies(rows)}</table></div>'


def overlap(groups: Iterable[Group]) -> bool:
    """Whether parts of a step went on at the same time: then they add up to more than the step."""
    return any(
        line["client_s"] + line["server_s"] + line.get("wire_s", 0.0) > 1.02 * line["step_s"]
        for group in groups
        for run in group.runs
        for line in run.timings
    )


def traffic(groups: Sequence[Group], looks: Mapping[str, Look]) -> str:
    """Bytes up and down per step, as bars on a logarithmic scale that begins at one byte."""
    means = [(group, group.bytes_per_step("up"), group.bytes_per_step("down")) for group in groups]
    most = max(max(up, down) for _, up, down in means)
    whole = max(math.log2(max(most, 2.0)), 1.0)
    ticks = "".join(
        f'<span style="left:{100 * 10 * power / whole:.1f}%">{name}</span>'
        for power, name in enumerate(("1 B", "1 KiB", "1 MiB", "1 GiB"))
        if 10 * power <= whole
    )
    rows = [f'<tr><th></th><td class="track"><div class="ticks">{ticks}</div></td><td></td></tr>']
    for group, up, down in means:
        look = looks[group.way]
        name = f"{look.key()} {html.escape(group.label)}" if len(means) > 1 else "up<br>down"
        bars = "".join(
            _bar(0.0, math.log2(max(size, 1.0)) / whole, look.name, faint=faint)
            for size, faint in ((up, False), (down, True))
        )
        said = (
            f"{amount(up)} up<br>{amount(down)} down" if len(means) > 1 else f"{amount(up)}<br>{amount(down)}"
        )
        rows.append(f'<tr><th>{name}</th><td class="track two">{bars}</td><td class="n">{said}</td></tr>')
    return f'<div class="wide"><table class="bars"><tbody>{"".join(rows)}</tbody></table></div>'


def _heading(group: Group, looks: Mapping[str, Look], said: str) -> str:
    key = looks[group.way].key()
    return f'<tr class="group"><th colspan="4">{key} {html.escape(group.label)} <span>{said}</span></th></tr>'


def _bodies(rows: Sequence[str]) -> str:
    """A body per group, so that a printed page breaks between groups."""
    text = ""
    for row in rows:
        text += ("</tbody><tbody>" if row.startswith('<tr class="group"') else "") + row
    return f"<tbody>{text}</tbody>".replace("<tbody></tbody>", "")


def _bar(begin: float, length: float, colour: str, *, faint: bool = False) -> str:
    style = f"margin-left:{100 * begin:.2f}%;width:{100 * length:.2f}%;background:var(--{colour})"
    return f'<i style="{style}{";opacity:.55" if faint else ""}"></i>'


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.005 else "&lt;1 %"


def _rest(line: Mapping[str, Any]) -> float:
    return max(line["step_s"] - line["client_s"] - line["server_s"] - line.get("wire_s", 0.0), 0.0)


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return median(found) if found else 0.0
