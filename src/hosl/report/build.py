"""report.html: a run, or many, on one page; self-contained, opens from disk, prints, reads in dark and light.

What the page is made of. Runs are read by `report_runs`, named and grouped by `report_groups`, drawn by
`report_pictures`; sections that need what is not there are left out.
"""

import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import yaml

from hosl.errors import FolderError
from hosl.report import figures as pictures
from hosl.report import tables
from hosl.report import text as words
from hosl.report.costs import overlap, traffic, waterfall
from hosl.report.groups import Comparison, PlannedLine, comparisons
from hosl.report.html import Section, cards, commands, folded, page, picture
from hosl.report.runs import Ends, Run, chosen_runs, read_run, run_folders, study_ends
from hosl.report.style import Look, looks
from hosl.system.atomic import whole_file

Planner = Callable[[Comparison], Sequence[PlannedLine]]
"""What memory would be at other cuts: `report_plan.planned_lines`, for who has torch."""

_REFERENCE = "reference_rows.json"
"""Of a study: which of its rows are 0 and 1 of gap closure, as its own file names them."""
_NO_PICTURES = (
    "<p class=\"note\">No curves: matplotlib is not installed (<code>pip install 'hosl[report]'</code>).</p>"
)


def write_report(run: Path, *, out: Path | None = None, planner: Planner | None = None) -> Path:
    """Write the page of one run, by default as `run`/report.html; returns its path.

    Raises:
        FolderError: if `run` is no run's folder, or `out` cannot be written.
    """
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
        folders: of the runs.
        out: the file.
        title: of the page; default: what is compared.
        chosen: what a reader must know of how the runs were chosen.
        planner: for the lines of memory against cut; None: measured points only.

    Raises:
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
        reference_rows: of a finished study: which rows are 0 and 1 of gap closure, kept in its folder; None: those
            that were kept.

    Raises:
        FolderError: if no run has begun, its runs.csv is not whole, or `out` cannot be written.
    """
    chosen = chosen_runs(study)
    folders = run_folders([study]) if chosen is None else [one.folder for one in chosen]
    runs = [read_run(folder) for folder in folders]
    if reference_rows is not None:
        kept = dict(zip(("frozen", "first_order"), reference_rows, strict=True))
        whole_file(study / _REFERENCE, json.dumps(kept).encode())
    rows = reference_rows or _kept_rows(study)
    ends = study_ends(runs, chosen, rows) if chosen and rows else None
    text = _comparison_page(
        runs, f"Study {study.resolve().name}", words.how_chosen(finished=chosen is not None), planner, ends
    )
    return _written(text, out or study / "report.html")


def _kept_rows(study: Path) -> tuple[str, str] | None:
    """What `hosl study` said of its references when it wrote the page; None: nothing, as versions before did."""
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
    (comparison,) = comparisons([run])
    planned = planner(comparison) if planner else []
    look, (group,) = _looks([comparison], planned), comparison.groups
    curves = pictures.run_curves(group, look, "curves") if run.steps and pictures.can_draw() else ""
    config = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    content = [
        cards(words.run_cards(group, planned)),
        Section(
            "Loss and accuracy", picture(curves) if pictures.can_draw() else _NO_PICTURES,
            "Training: every step's batch (thin), and means over stretches of steps. Points: the whole dev split."
            if curves else "",
        ),
        *_cost_sections(comparison, planned, look, "memory"),
        Section("Evaluations", tables.evaluations([group]) if run.dev or run.test else "", long=True),
        Section("Make it again", commands([("", command) for command in words.again(run)])),
        Section("Settings that are not at their defaults", tables.changed_settings(run), long=True),
        Section("Versions and machine", tables.versions([run])),
        Section(
            "In full", folded("Configuration", config) + folded("Record", json.dumps(run.record, indent=2)), long=True
        ),
    ]  # fmt: skip
    return page(f"{run.method} on {words.task(run)}", str(run.folder), words.run_sentence(run), content)


def _comparison_page(
    asked: Sequence[Run], title: str, chosen: str, planner: Planner | None, ends: Ends | None = None
) -> str:
    found = comparisons(asked)
    groups = [group for comparison in found for group in comparison.groups]
    runs = [run for group in groups for run in group.runs]
    planned = [list(planner(comparison)) if planner else [] for comparison in found]
    look = _looks(found, [line for lines in planned for line in lines])
    content: list[object] = [cards(words.comparison_cards(found, len(runs)))]
    for place, (comparison, lines, heading) in enumerate(
        zip(found, planned, words.headings(found), strict=True)
    ):
        if len(found) > 1:
            content.append(f'<section class="part"><h2>{html.escape(heading)}</h2></section>')
        content += _comparison_sections(comparison, lines, look, chosen, f"{place}", ends)
    again = [
        (f"{group.label}, seed {run.seed}", words.again(run)[0]) for group in groups for run in group.runs
    ]
    content += [
        Section("Make them again", commands(again), long=True),
        Section("Versions and machines", tables.versions(runs)),
    ]
    return page(
        title or words.title(found), words.place(runs), words.comparison_sentence(asked, found), content
    )


def _comparison_sections(
    comparison: Comparison,
    planned: Sequence[PlannedLine],
    look: Mapping[str, Look],
    chosen: str,
    name: str,
    ends: Ends | None,
) -> list[Section]:
    """What stands of one task and one model; pictures of several groups only where there are several."""
    groups, draws = comparison.groups, pictures.can_draw()
    table, gap_ends = tables.results(comparison, look, ends)
    timed_on = tables.machine([run for group in groups for run in group.runs])
    compared = draws and sum(bool(group.finished) and group.timed for group in groups) > 1
    scatter = pictures.accuracy_against_memory(comparison, look, f"pareto{name}") if compared else ""
    stepped = draws and any(run.steps for group in groups for run in group.runs)
    curves = picture(pictures.curves(comparison, look, f"curves{name}")) if stepped else ""
    legend = "".join(f"<li>{look[way].key()}{html.escape(way)}</li>" for way in comparison.ways)
    several = any(len(group.runs) > 1 for group in groups)
    return [
        Section(
            "What they reach and cost", table,
            html.escape(words.results_note(comparison, chosen, timed_on, gap_ends), quote=False), long=True,
        ),
        Section(
            "Accuracy against client memory", picture(scatter),
            "Up and to the left is better; the thin line is the Pareto front. "
            f"{'Means over seeds, bars of one standard deviation. ' if several else ''}{words.MEASURED}",
        ),
        Section(
            "Loss and accuracy", f'<ul class="legend">{legend}</ul>{curves}' if draws else _NO_PICTURES,
            f"{'Means over seeds, bands of one standard deviation. ' if several else ''}Training losses are of single "
            "batches, and means over stretches of steps." if curves else "", long=len(comparison.cuts) > 2,
        ),
        *_cost_sections(comparison, planned, look, f"memory{name}"),
        Section("Where they differ", tables.differences(comparison), long=True),
        Section("Evaluations", _folded_table("All of them, means over seeds", tables.evaluations(groups)), long=True),
    ]  # fmt: skip


def _cost_sections(
    comparison: Comparison, planned: Sequence[PlannedLine], look: Mapping[str, Look], name: str
) -> list[Section]:
    """Memory against cut, bytes, and the waterfall of a step."""
    groups = [group for group in comparison.groups if group.timed]
    if not groups:
        made = any(run.steps for group in comparison.groups for run in group.runs)
        said = "No step was timed." if made else "No step was made."
        return [Section("What a step costs", f'<p class="note">{said}</p>')]
    runs = [run for group in groups for run in group.runs]
    memory, steps = "", sum(len(run.timings) for run in runs)
    if pictures.can_draw() and (planned or len(comparison.cuts) > 1):
        memory = pictures.memory_against_cut(groups, planned, look, name)
    lines = "Lines: planned for the longest batch, by running a step's code without data. " if planned else ""
    at_once = (
        "Some go on at the same time, so that they add up to more than the step. " if overlap(groups) else ""
    )
    return [
        Section("Client memory against the cut", picture(memory), f"Points: measured. {lines}{words.MEASURED}"),
        Section(
            "Bytes of a step", traffic(groups, look),
            "Means over steps, of the arrays and numbers that cross, before a transport frames them. The scale is "
            "logarithmic.",
        ),
        Section(
            "A step from start to end", waterfall(groups, look),
            f"Medians over {steps:,} steps, each kind of work on its own, in the order in which a step begins them. "
            f"{at_once}Measured on {html.escape(tables.machine(runs))}.",
            long=len(groups) > 2,
        ),
    ]  # fmt: skip


def _looks(found: Sequence[Comparison], planned: Sequence[PlannedLine]) -> dict[str, Look]:
    methods = {way: comparison.method_of(way) for comparison in found for way in comparison.ways}
    return looks(methods | {line.way: line.method for line in planned if line.way not in methods})


def _folded_table(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>" if content else ""


def _written(text: str, path: Path) -> Path:
    """Write a page whole, or not at all."""
    try:
        whole_file(path, text.encode())
    except OSError as cause:
        raise FolderError(
            f"{path} cannot be written: {cause.strerror}; choose another file with -o"
        ) from cause
    return path
