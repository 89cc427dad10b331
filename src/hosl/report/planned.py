"""The planner's lines for memory against cut: the ways that a report shows and the two ends; a plan as a figure.

The planner needs torch, so that `report` does not know this module: who has torch hands `planned_lines` over.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hosl.config import Config
from hosl.core.methods import FIRST_ORDER, FROZEN
from hosl.errors import ConfigError, HoslError
from hosl.report import figures
from hosl.report.groups import PlannedLine, TaskGroups, in_order
from hosl.report.runs import Run
from hosl.report.style import looks, on_paper
from hosl.system.gc_paused import gc_paused

if TYPE_CHECKING:
    from hosl.planner.model_shape import ModelShape
    from hosl.planner.request import Planned


def planned_lines(part: TaskGroups) -> list[PlannedLine]:
    """Line per way, and for the two ends; without those that cannot be planned."""
    wanted = [(way, run, config) for way, run, config in _ways(part) if "longest_batch" in run.record]
    if not wanted:
        return []
    from hosl.planner.model_shape import model_shape

    try:
        shape = model_shape(wanted[0][2].model.name)
    except HoslError:  # the model is not there any more
        return []
    cuts = sorted({1, shape.blocks, *part.cuts})  # blocks are alike: in between, memory is a line
    lines = []
    with gc_paused():
        for way, run, config in [*wanted, *_ends(wanted)]:
            # a picture is nothing to fail for: the planner may not follow a setting, or torch an operation without data
            with contextlib.suppress(HoslError, RuntimeError):
                lines.append(
                    PlannedLine(way, config.method, _peaks(config, shape, run.record["longest_batch"], cuts))
                )
    return in_order(lines)


def draw_plan(plan: "Planned", file: Path) -> None:
    """Write a plan's memory against cut, a line for every way to train, with the device's limit.

    Raises:
        ConfigError: if matplotlib is not installed.
    """
    if not figures.can_draw():
        raise ConfigError("--picture needs matplotlib: pip install 'hosl[report]'")
    lines: dict[str, PlannedLine] = {}
    for row in plan.rows:
        if row.config.client.micro_batch_size is None:
            line = lines.setdefault(row.name, PlannedLine(row.name, row.config.method, {}))
            line.peak_bytes[row.cut] = row.client_process_bytes
    question = plan.question
    line_looks = looks({line.way: line.method for line in lines.values()}, on_paper)
    figure = figures.memory_against_cut(
        [], list(lines.values()), line_looks, quantity="client process, {}", limit_bytes=question.device_memory_bytes,
        title=f"{question.shape.name}: {question.rows} x {question.tokens} tokens",
    )  # fmt: skip
    figures.save(figure, file, line_looks)


def _ways(part: TaskGroups) -> Iterator[tuple[str, Run, Config]]:
    """Every way with a run that knows its whole model: a device that joined a server has half of it."""
    for way in part.methods:
        runs = [run for group in part.groups if group.way == way for run in group.runs]
        whole = [(run, run.parsed) for run in runs if run.parsed is not None and not run.joined]
        if whole:
            yield way, *whole[0]


def _ends(ways: Sequence[tuple[str, Run, Config]]) -> Iterator[tuple[str, Run, Config]]:
    """Those of the two that are not among the ways, with the first one's other settings where these allow it."""
    from hosl.methods.variants import VARIANTS

    _, run, base = ways[0]
    rows, methods = {row.name: row for row in VARIANTS}, {config.method for _, _, config in ways}
    for end in (FROZEN, FIRST_ORDER):  # the least a client can take, and what plain backprop takes
        if end not in methods:
            with contextlib.suppress(ConfigError):
                yield end, run, rows[end].applied(base, cut=run.cut)


def _peaks(
    config: Config, shape: "ModelShape", batch: dict[str, int], cuts: Sequence[int]
) -> dict[int, float]:
    """Cut -> the most that the client's tensors take, at those cuts that the method allows."""
    from hosl.planner.costs import client_memory, lowest_with_block, with_cut

    costs = {}
    return {
        cut: client_memory(with_cut(config, cut), shape, costs)(batch["rows"], batch["tokens"])[1]
        for cut in cuts
        if cut >= lowest_with_block(config)
    }
