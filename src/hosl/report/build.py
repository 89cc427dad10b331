"""report.html: a run, or many, on one page; self-contained, opens from disk, prints, reads in dark and light.

Runs are read by `runs`, named and grouped by `groups`, compared by `comparison`, drawn by `figures` and put into the
templates by `render`; sections that need what is not there are left out.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from hosl.errors import FolderError
from hosl.report import figures, tables, text
from hosl.report.costs import overlap, traffic, waterfall
from hosl.report.groups import PlannedLine, TaskGroups, by_task_and_model
from hosl.report.render import check_installed, installed, no_page, rendered
from hosl.report.runs import ReferenceRuns, Run, chosen_runs, read_run, reference_runs, run_folders
from hosl.report.style import Looks, looks
from hosl.system.atomic import whole_file

Planner = Callable[[TaskGroups], Sequence[PlannedLine]]
"""Memory at other cuts, planned: `planned.planned_lines`, for who has torch."""

_REFERENCE = "reference_rows.json"
"""File of a study that says which of its rows are 0 and 1 of gap closure, as its own file names them."""


def write_report(run: Path, *, out: Path | None = None, planner: Planner | None = None) -> Path | None:
    """Write the page of one run, by default as `run`/report.html; returns its path.

    A run must not fail for want of a page: without Jinja2 a line on standard error says how to get it.

    Raises:
        FolderError: if `run` is no run's folder, or `out` cannot be written.
    """
    if not installed():
        sys.stderr.write(f"{no_page(run)}\n")
        return None
    read = read_run(run)
    if out is None and read.joined and read.test is None:
        raise FolderError(
            f"{run} is under way: `hosl join` would take a report.html in it as the sign that it is finished; name "
            "another file with -o"
        )
    return _written(_run_page(read, planner), out or run / "report.html")


def write_comparison(
    folders: Sequence[Path], out: Path, *, title: str = "", chosen: str = "", planner: Planner | None = None
) -> Path:
    """Write one page of many runs to `out`; returns its path.

    Args:
        folders: the runs'.
        out: the file.
        title: the page's; default: what is compared.
        chosen: what a reader must know of how the runs were chosen.
        planner: for the lines of memory against cut; None: measured points only.

    Raises:
        ConfigError: if the extra `report` is not installed.
        FolderError: if one is no run's folder, or `out` cannot be written.
    """
    return _written(_comparison_page([read_run(folder) for folder in folders], title, chosen, planner), out)


def write_study_report(
    study: Path,
    *,
    out: Path | None = None,
    planner: Planner | None = None,
    reference_rows: tuple[str, str] | None = None,
) -> Path:
    """Write the page of a study's chosen runs, by default as `study`/report.html; returns its path.

    Args:
        study: its folder.
        out: the file.
        planner: as in `write_comparison`.
        reference_rows: which rows of a finished study are 0 and 1 of gap closure, kept in its folder; None: those
            that were kept.

    Raises:
        ConfigError: if the extra `report` is not installed.
        FolderError: if no run has begun, its runs.csv is not whole, or `out` cannot be written.
    """
    chosen = chosen_runs(study)
    folders = run_folders([study]) if chosen is None else [one.folder for one in chosen]
    runs = [read_run(folder) for folder in folders]
    if reference_rows is not None:
        kept = dict(zip(("frozen", "first_order"), reference_rows, strict=True))
        whole_file(study / _REFERENCE, json.dumps(kept).encode())
    rows = reference_rows or _kept_rows(study)
    references = reference_runs(runs, chosen, rows) if chosen and rows else None
    title, how = f"Study {study.resolve().name}", text.how_chosen(finished=chosen is not None)
    return _written(_comparison_page(runs, title, how, planner, references), out or study / "report.html")


def _kept_rows(study: Path) -> tuple[str, str] | None:
    """The reference rows that `hosl study` kept when it wrote the page; None: none, as versions before did."""
    try:
        kept = json.loads((study / _REFERENCE).read_text(encoding="utf-8"))
        return kept["frozen"], kept["first_order"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as cause:
        raise FolderError(
            f"{study / _REFERENCE} cannot be read: {cause}; call `hosl study` again, which writes it"
        ) from cause


def _run_page(run: Run, planner: Planner | None) -> str:
    (part,) = by_task_and_model([run])
    planned = planner(part) if planner else []
    page_looks, (group,) = _looks([part], planned), part.groups
    curves = figures.curves([group], page_looks) if run.steps and figures.can_draw() else None
    return rendered(
        "run.html.jinja", title=f"{run.method} on {run.task_name}", over=str(run.folder),
        sentence=text.run_sentence(run), cards=text.run_cards(group, planned), can_draw=figures.can_draw(),
        curves=curves and figures.inline(curves, "curves", f"Loss and {text.reached(part)} over steps", page_looks),
        reached=text.reached(part),
        costs=_costs(part, planned, page_looks, "memory"), measured=text.MEASURED,
        evaluations=tables.evaluations([group]), classes=tables.classes(run), answers=run.answers,
        commands=[("", command) for command in text.again(run)],
        settings=tables.changed_settings(run), versions=tables.versions([run]),
        config=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True),
        record=json.dumps({name: fact for name, fact in run.record.items() if name != "config"}, indent=2),
    )  # fmt: skip


def _comparison_page(
    asked: Sequence[Run],
    title: str,
    how: str,
    planner: Planner | None,
    references: ReferenceRuns | None = None,
) -> str:
    check_installed()
    parts = by_task_and_model(asked)
    planned = [list(planner(part)) if planner else [] for part in parts]
    page_looks = _looks(parts, [line for lines in planned for line in lines])
    groups = [group for part in parts for group in part.groups]
    runs = [run for group in groups for run in group.runs]
    return rendered(
        "comparison.html.jinja", title=title or text.title(parts), over=text.common_folder(runs),
        sentence=text.comparison_sentence(asked, parts), cards=text.comparison_cards(parts, len(runs)),
        measured=text.MEASURED, can_draw=figures.can_draw(), versions=tables.versions(runs),
        commands=[(f"{group.label}, seed {run.seed}", text.again(run)[0]) for group in groups for run in group.runs],
        parts=[
            {"heading": heading, **_part(part, lines, page_looks, how, f"{number}", references)}
            for number, (part, lines, heading) in enumerate(zip(parts, planned, text.headings(parts), strict=True))
        ],
    )  # fmt: skip


def _part(
    part: TaskGroups,
    planned: Sequence[PlannedLine],
    page_looks: Looks,
    how: str,
    name: str,
    of_study: ReferenceRuns | None,
) -> dict[str, Any]:
    """Everything about one task and one model; figures of several groups only where there are several."""
    groups, draws, reached = part.groups, figures.can_draw(), text.reached(part)
    comparison = part.comparison(of_study)
    timed_on = tables.machine([run for group in groups for run in group.runs])
    note = [
        how, text.statistics_note(comparison), "Client peak: tensors of the client's half.", text.MEASURED,
        f"Steps were timed on {timed_on}.",
    ]  # fmt: skip
    several = draws and sum(bool(group.finished and group.timings) for group in groups) > 1
    arms = [group.arm for group in groups]
    scatter = figures.accuracy_against_memory(arms, page_looks) if several else None
    stepped = draws and any(run.steps for group in groups for run in group.runs)
    curves = figures.curves(groups, page_looks) if stepped else None
    return {
        "reached": reached,
        "table": tables.compared(comparison, page_looks, "way to train"), "note": " ".join(filter(None, note)),
        "scatter": scatter and figures.inline(
            scatter, f"pareto{name}", f"Test {reached} against client memory", page_looks
        ),
        "curves": curves and figures.inline(
            curves, f"curves{name}", f"Training loss, dev loss and dev {reached} over steps", page_looks
        ),
        "ways": {way: page_looks[way] for way in part.methods}, "cuts": len(part.cuts),
        "several_seeds": any(len(group.runs) > 1 for group in groups),
        "costs": _costs(part, planned, page_looks, f"memory{name}"), "differences": tables.differences(groups),
        "evaluations": tables.evaluations(groups),
    }  # fmt: skip


def _costs(part: TaskGroups, planned: Sequence[PlannedLine], page_looks: Looks, name: str) -> dict[str, Any]:
    """Memory against cut, bytes, and the waterfall of a step."""
    timed = [group for group in part.groups if group.timings]
    runs = [run for group in timed for run in group.runs]
    memory = None
    if timed and figures.can_draw() and (planned or len(part.cuts) > 1):
        figure = figures.memory_against_cut([(group.cut, group.arm) for group in timed], planned, page_looks)
        memory = figures.inline(figure, name, "Client memory against the cut", page_looks)
    return {
        "stepped": any(run.steps for group in part.groups for run in group.runs), "planned": bool(planned),
        "memory": memory, "traffic": traffic(timed) if timed else None, "waterfall": waterfall(timed),
        "overlap": overlap(timed), "steps": sum(len(run.timings) for run in runs), "machine": tables.machine(runs),
        "looks": page_looks,
    }  # fmt: skip


def _looks(parts: Sequence[TaskGroups], planned: Sequence[PlannedLine]) -> Looks:
    methods: Mapping[str, str] = {way: method for part in parts for way, method in part.methods.items()}
    return looks({**methods, **{line.way: line.method for line in planned if line.way not in methods}})


def _written(page: str, path: Path) -> Path:
    """Write a page whole, or not at all."""
    try:
        whole_file(path, page.encode())
    except OSError as cause:
        raise FolderError(
            f"{path} cannot be written: {cause.strerror}; choose another file with -o"
        ) from cause
    return path
