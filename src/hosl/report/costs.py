"""Time and bytes of a step, as numbers and as shares of the longest bar; templates draw the bars."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeAlias

from hosl.report.groups import Group

_CALLS = {
    ("client", "probes"): "probes", ("client", "probe_with_dropout"): "first probe",
    ("server", "loss_with_dropout"): "loss of the first probe", ("server", "losses"): "losses of the probes",
    ("client", "forward"): "forward", ("client", "forward_keeping_inputs"): "forward, inputs kept",
    ("client", "forward_for_backward"): "forward, kept for backward",
    ("server", "states"): "forward to the head", ("client", "head_loss"): "losses of the head",
    ("server", "states_for_step"): "forward to the head, kept for backward",
    ("client", "head_gradient"): "head, forward and backward", ("client", "head_update"): "update of the head",
    ("server", "step_at_states"): "backward, update", ("server", "step"): "forward, backward, update",
    ("server", "step_with_dropout"): "forward, backward, update",
    ("server", "step_at_mean"): "forward, backward, update", ("server", "gradient"): "gradient",
    ("server", "probe"): "probes", ("server", "descend"): "update",
    ("client", "projections"): "probes, projected", ("client", "one_sided_projections"): "one-sided probes",
    ("client", "tangents"): "forward-mode probes", ("client", "guide"): "directions from the gradient",
    ("client", "descend_by_feedback"): "update by residual feedback",
    ("client", "slope"): "slopes of the output projections", ("client", "node_slopes"): "slopes of the tokens",
    ("client", "descend"): "update along directions", ("client", "descend_nodes"): "update of the queries",
    ("client", "descend_along"): "update of the output projections", ("client", "backward"): "backward, update",
}  # fmt: skip
"""Work of every call of `hosl.core.rounds`, in the order in which a step of any method begins them."""


@dataclass(frozen=True)
class Part:
    """Stretch of a step."""

    party: str
    """client, server, wire or rest."""
    name: str
    seconds: float


Bar: TypeAlias = tuple[Part, float, float, float]
"""(part, where it begins and how long it is as shares of the scale, share of its own step)."""


def step_parts(group: Group) -> list[Part]:
    """Medians over the steps of all runs, each call on its own, in the order of a step."""
    lines, order = group.timings, list(_CALLS)
    medians: dict[tuple[str, str], float] = {}
    for party in ("client", "server"):
        calls = dict.fromkeys(call for line in lines for call in line.get(f"{party}_calls_s", ()))
        for call in calls:
            times = [line[f"{party}_calls_s"].get(call, 0.0) for line in lines if f"{party}_calls_s" in line]
            medians[party, call] = median(times)
        if not calls:  # a run of a version that did not tell calls apart
            medians[party, ""] = _median(line[f"{party}_s"] for line in lines)
    in_order = sorted(medians, key=lambda call: order.index(call) if call in _CALLS else len(order))
    parts = [Part(call[0], _CALLS.get(call, call[1].replace("_", " ")), medians[call]) for call in in_order]
    wire = [line["wire_s"] for line in lines if "wire_s" in line]
    if wire:
        parts.append(Part("wire", "sending, receiving, waiting for a turn", median(wire)))
    parts.append(Part("rest", "drawing the batch, bookkeeping", _median(_rest(line) for line in lines)))
    return parts


def waterfall(groups: Sequence[Group]) -> list[tuple[Group, list[Bar]]]:
    """Step of each group, its parts one after the other, on one scale."""
    steps = [(group, step_parts(group)) for group in groups]
    totals = [sum(part.seconds for part in parts) or 1.0 for _, parts in steps]
    longest = max(totals, default=1.0)
    charts = []
    for (group, parts), total in zip(steps, totals, strict=True):
        begin, bars = 0.0, []
        for part in parts:
            bars.append((part, begin / longest, part.seconds / longest, part.seconds / total))
            begin += part.seconds
        charts.append((group, bars))
    return charts


def overlap(groups: Iterable[Group]) -> bool:
    """Whether parts of a step went on at the same time: then they add up to more than the step."""
    return any(
        line["client_s"] + line["server_s"] + line.get("wire_s", 0.0) > 1.02 * line["step_s"]
        for group in groups
        for line in group.timings
    )


def traffic(groups: Sequence[Group]) -> tuple[list[tuple[float, str]], list[tuple[Group, float, float]]]:
    """Mean bytes of a step on a logarithmic scale from one byte to the most, as shares of it.

    Returns:
        (share, name) of each tick, and (group, up, down) of each group.
    """
    sizes = [(group, group.arm.costs.bytes_up, group.arm.costs.bytes_down) for group in groups]
    scale = max(math.log2(max(max(up, down, 2.0) for _, up, down in sizes)), 1.0)
    names = enumerate(("1 B", "1 KiB", "1 MiB", "1 GiB"))
    ticks = [(10 * power / scale, name) for power, name in names if 10 * power <= scale]
    return ticks, [
        (g, math.log2(max(up, 1.0)) / scale, math.log2(max(down, 1.0)) / scale) for g, up, down in sizes
    ]


def _rest(line: Mapping[str, Any]) -> float:
    return max(line["step_s"] - line["client_s"] - line["server_s"] - line.get("wire_s", 0.0), 0.0)


def _median(values: Iterable[float]) -> float:
    numbers = list(values)
    return median(numbers) if numbers else 0.0
