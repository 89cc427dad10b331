"""A rate study from start to end: measure the cells that are missing, then render.

A cell is one run of HOSL, T times `hosl.core.rounds.hosl_round`, and its line in cells.jsonl: the average over steps of
|grad f(theta_t)|^2, f being the objective over all rows and theta_t both halves as they enter the step.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from hosl.core.directions import Distribution, direction_seed
from hosl.core.protocols import FirstOrderServerSide, ZerothOrderClientSide
from hosl.core.rounds import StepInputs, hosl_round
from hosl.core.targets import Batch
from hosl.errors import FolderError, NonFiniteError
from hosl.system.interrupts import Stop
from hosl.system.progress import open_view
from hosl.system.run_folder import RunLock
from research.convergence_rate.config import (
    BertProblem,
    Cell,
    ChainProblem,
    RateStudy,
    grid_cells,
    step_size,
    tuning_cells,
)
from research.convergence_rate.figures import draw_rates
from research.convergence_rate.fit import measured_axes
from research.convergence_rate.table import write_rates

Lines: TypeAlias = dict[Cell, dict[str, Any]]

_BERT_COST = 80
"""Of one evaluation, in those of a chain: for the time left only."""


@runtime_checkable
class CutProblem(Protocol):
    """An objective in two halves whose full gradient can be had."""

    @property
    def client(self) -> ZerothOrderClientSide:
        """The half that is probed."""
        ...

    @property
    def server(self) -> FirstOrderServerSide:
        """The half that has gradients."""
        ...

    @property
    def client_size(self) -> int:
        """d_c."""
        ...

    def batch(self, step: int) -> Batch:
        """The mini-batch of a step."""
        ...

    def squares(self) -> tuple[float, float]:
        """|df/dtheta_c|^2 and |df/dtheta_s|^2 of the full objective."""
        ...

    def loss(self) -> float:
        """The full objective."""
        ...


def run_rate_study(study: RateStudy) -> dict[str, Any]:
    """Measure what is missing, then write rate.csv, rate.md and rate.svg; returns what was done.

    Raises:
        FolderError: if another process is at work in the study's folder, or a line of its cells.jsonl is garbled.
    """
    out = Path(study.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out), Stop() as stop:
        done = read_cells(out / "cells.jsonl")
        before = len(done)
        finished = _measure_missing(study, out / "cells.jsonl", done, stop)
        answer: dict[str, Any] = {"study": str(out), "finished": finished, "made": len(done) - before}
        if not finished:
            return answer
        scales = {name: chosen_scale(study, name, done) for name in study.problems}
        found, of_grid = [], []
        for name, problem in study.problems.items():
            lines = [done[cell] for cell in grid_cells(study, name, scales[name])]
            found += measured_axes(name, problem, lines)
            of_grid += lines
        tried = {name: [done[cell] for cell in tuning_cells(study, name)] for name in study.problems}
        draw_rates(found, out / "rate.svg")
        table = write_rates(study, found, of_grid, scales, tried, out)
        return answer | {"cells": len(of_grid), "table": str(table), "csv": str(out / "rate.csv")}


def missing_cells(study: RateStudy, done: Lines) -> list[Cell]:
    """What there is to measure still; until a problem is tuned, its grid stands there at the first c."""
    found = []
    for name, problem in study.problems.items():
        tuning = tuning_cells(study, name)
        tuned = all(cell in done for cell in tuning)
        scale = chosen_scale(study, name, done) if tuned else problem.scales[0]
        cells = dict.fromkeys([*tuning, *grid_cells(study, name, scale)])
        found += [cell for cell in cells if cell not in done]
    return found


def chosen_scale(study: RateStudy, name: str, done: Lines) -> float:
    """c with the lowest average at the middle of the grid, among those that did not diverge; of equals the first.

    Raises:
        NonFiniteError: if all have.
    """
    tried = [done[cell] for cell in tuning_cells(study, name)]
    kept = [line for line in tried if line["mean_square"] is not None]
    if not kept:
        scales = list(study.problems[name].scales)
        raise NonFiniteError(
            f"problems.{name}: the average must be finite for one of scales at least, got none for {scales}: lower them"
        )
    return min(kept, key=lambda line: line["mean_square"])["scale"]


def measure(
    study: RateStudy, cell: Cell, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any] | None:
    """One cell; None where it was stopped on its way."""
    problem = study.problems[cell.problem]

    def eta_of(client_size: int) -> float:
        return step_size(cell.scale, cell.steps, cell.directions, client_size)

    cut = _cut_problem(problem, cell, eta_of, study.distribution)
    eta, loss_start = eta_of(cut.client_size), cut.loss()
    line = {**asdict(cell), "client_size": cut.client_size, "learning_rate": eta, "loss_start": loss_start}
    every = problem.measure_every
    squares: list[tuple[float, float]] = []
    try:
        for step in range(1, cell.steps + 1):
            if stopped():
                return None
            if (step - 1) % every == every // 2:
                squares.append(cut.squares())
            seeds = [direction_seed(cell.seed, step, q) for q in range(cell.directions)]
            hosl_round(
                cut.client,
                cut.server,
                cut.batch(step),
                StepInputs(step, seeds=seeds, epsilon=study.epsilon, learning_rate=eta),
            )
        client, server = (float(of_half) for of_half in np.mean(squares, axis=0))
    except NonFiniteError:
        client = server = float("nan")
    found = (client + server, client, cut.loss())
    finite = [value if np.isfinite(found).all() else None for value in found]
    return line | dict(zip(("mean_square", "client_mean_square", "loss_end"), finite, strict=True))


def read_cells(path: Path) -> Lines:
    """The measured cells; a last line that a killed process left unfinished is cut off, in the file too.

    Raises:
        FolderError: naming the line that holds no cell.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    found: Lines = {}
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            found[Cell(**{name: line[name] for name in Cell.__dataclass_fields__})] = line
        except (ValueError, KeyError, TypeError) as cause:
            raise FolderError(
                f"{path}, line {number} is no measured cell: {cause!r}; delete the line, and its cell is measured again"
            ) from cause
    return found


def _measure_missing(study: RateStudy, path: Path, done: Lines, stop: Stop) -> bool:
    """Measure and append, cell by cell; whether all are there now."""
    missing = missing_cells(study, done)
    if not missing:
        return True
    spent = _cost(study, list(done))
    total = spent + _cost(study, missing)
    with (
        open_view(f"study {path.parent}", spent, total, unit="work") as view,
        path.open("a", encoding="utf-8") as file,
    ):
        while missing := missing_cells(study, done):
            cell = missing[0]
            line = measure(study, cell, lambda: stop.requested)
            if line is None:
                return False
            file.write(json.dumps(line) + "\n")
            file.flush()
            done[cell] = line
            spent += _cost(study, [cell])
            value = line["mean_square"]
            view.step(
                min(spent, total),
                {
                    "cells left": str(len(missing) - 1),
                    cell.problem: f"T {cell.steps} Q {cell.directions} d_c {line['client_size']} seed {cell.seed}: "
                    + ("diverged" if value is None else f"{value:.4g}"),
                },
            )
    return True


def _cost(study: RateStudy, cells: Sequence[Cell]) -> int:
    """In forward passes of a chain, about."""
    total = 0
    for cell in cells:
        kind = study.problems.get(cell.problem)
        total += cell.steps * (2 * cell.directions + 2) * (_BERT_COST if isinstance(kind, BertProblem) else 1)
    return total


def _cut_problem(
    problem: ChainProblem | BertProblem,
    cell: Cell,
    eta_of: Callable[[int], float],
    distribution: Distribution,
) -> CutProblem:
    if isinstance(problem, ChainProblem):
        from research.convergence_rate.chain import CutChain

        return CutChain(problem, cell.cut, cell.seed, eta_of, distribution)
    from research.convergence_rate.bert import (
        CutBert,  # torch and transformers: not for a chain, nor for rendering
    )

    return CutBert(problem, cell.cut, cell.seed, eta_of, distribution)
