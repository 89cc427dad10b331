"""Lines for a report's memory against cut: what the planner says of the ways that it shows, and of the two ends.

The planner needs torch, so that `report` does not know this module: who has torch hands `planned_lines` over.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from hosl.config import Config
from hosl.errors import ConfigError, HoslError
from hosl.report.groups import Comparison, PlannedLine, in_order
from hosl.report.runs import Run
from hosl.system.gc_paused import gc_paused

if TYPE_CHECKING:
    from hosl.planner.model_shape import ModelShape

_ENDS = ("frozen", "fo-fo")
"""Methods that are planned in any case: the least a client can take, and what plain backprop takes."""


def planned_lines(comparison: Comparison) -> list[PlannedLine]:
    """A line per way, and for the two ends; without those that cannot be planned."""
    wanted = [(way, run, config) for way, run, config in _ways(comparison) if "longest_batch" in run.record]
    if not wanted:
        return []
    from hosl.planner.model_shape import model_shape

    try:
        shape = model_shape(wanted[0][2].model.name)
    except HoslError:  # the model is not there any more
        return []
    cuts = sorted({1, shape.blocks, *comparison.cuts})  # blocks are alike: in between, memory is a line
    lines = []
    with gc_paused():
        for way, run, config in [*wanted, *_ends(wanted)]:
            # a picture is nothing to fail for: the planner may not follow a setting, or torch an operation without data
            with contextlib.suppress(HoslError, RuntimeError):
                lines.append(
                    PlannedLine(way, config.method, _peaks(config, shape, run.record["longest_batch"], cuts))
                )
    return in_order(lines)


def _ways(comparison: Comparison) -> Iterator[tuple[str, Run, Config]]:
    """Every way with a run that knows its whole model: a device that joined a server has half of it."""
    for way in comparison.ways:
        runs = [run for group in comparison.groups if group.way == way for run in group.runs]
        found = [(run, run.parsed) for run in runs if run.parsed is not None and not run.joined]
        if found:
            yield way, *found[0]


def _ends(ways: Sequence[tuple[str, Run, Config]]) -> Iterator[tuple[str, Run, Config]]:
    """Those of the two that are not among the ways, with the first one's other settings where these allow it."""
    from hosl.methods.variants import VARIANTS

    _, run, base = ways[0]
    rows, methods = {row.name: row for row in VARIANTS}, {config.method for _, _, config in ways}
    for end in _ENDS:
        if end not in methods:
            with contextlib.suppress(ConfigError):
                yield end, run, rows[end].applied(base, cut=run.cut)


def _peaks(
    config: Config, shape: "ModelShape", batch: dict[str, int], cuts: Sequence[int]
) -> dict[int, float]:
    """Cut -> the most that the client's tensors take, at those cuts that the method allows."""
    from hosl.planner.costs import client_memory, lowest_with_block, with_cut

    known = {}
    return {
        cut: client_memory(with_cut(config, cut), shape, known)(batch["rows"], batch["tokens"])[1]
        for cut in cuts
        if cut >= lowest_with_block(config)
    }
