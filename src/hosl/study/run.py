"""A study from start to end: make the runs that are missing, as many at a time as there are cores, then render.

The next runs: `grid`. One run: `process`. What they amount to: `tables` and `runs_csv`.
"""

import difflib
import time
from pathlib import Path
from typing import Any

from hosl.config import Config
from hosl.errors import ConfigError, FolderError
from hosl.report.build import write_study_report
from hosl.report.planned import planned_lines
from hosl.report.render import check_installed
from hosl.report.runs import CHOSEN_RUNS
from hosl.study.config import Study, study_grid, study_groups
from hosl.study.files import Places, check_same_study, check_unchanged_inputs, drop_weights, read_summaries
from hosl.study.grid import Grid, Summary, Trial, dev_loss
from hosl.study.process import POLL_S, RunProcess
from hosl.study.runs_csv import write_runs
from hosl.study.tables import write_tables
from hosl.system.interrupts import Stop
from hosl.system.machine import cores
from hosl.system.progress import open_view
from hosl.system.run_folder import RunLock


def run_study(study: Study, *, file: str, command: str) -> dict[str, Any]:
    """Make the runs that are missing, then write tables, runs and figures; returns what was done.

    `file` has the study. `command` is what makes it; with `--run NAME` after it, one run.

    Raises:
        FolderError: if another process is at work in the study's folder, or it is another study's, or it holds runs
            with other settings or data.
        RequestError, FailureError: with the line of a run that failed for another reason than divergence.
    """
    check_installed()
    out, grid = Path(study.output_dir), study_grid(study)
    places = Places.below(out)
    out.mkdir(parents=True, exist_ok=True)
    with RunLock(out):
        check_same_study(out, file)
        before = read_summaries(grid, places)
        if grid.needed(before):  # a list of fewer runs would make the study look finished
            (out / CHOSEN_RUNS).unlink(missing_ok=True)
        done = run_grid(grid, places, done=before, at_once=study.at_once, keep_models=study.keep_models)
        missing = len(grid.needed(done))
        made = _made(grid, done)
        answer: dict[str, Any] = {
            "study": str(out), "finished": not missing, "runs": grid.total(done),
            "made": len(done.keys() - before.keys()),
            "diverged": sum("diverged" in done[run.name] for run in made),
        }  # fmt: skip
        if missing:
            return answer
        chosen = grid.chosen(done)
        # the command of now: summaries of an earlier version say one that runs on all cores
        lines = [done[run.name] | {"command": places.command(run)} for run in made]
        write_runs(study_groups(study), lines, chosen, out)
        answer |= write_tables(study, study_groups(study), chosen, out, command)
        try:
            rows = study.frozen, study.first_order
            answer["report"] = str(write_study_report(out, planner=planned_lines, reference_rows=rows))
        except FolderError as cause:  # tables need the summaries alone, a page the runs' own files
            (out / "report.html").unlink(missing_ok=True)
            answer["no_report"] = str(cause)
        return answer


def first_run(study: Study) -> Trial:
    """Run that a study begins with."""
    return study_grid(study).needed({})[0]


def check_runs(study: Study) -> int:
    """Check the config of every run, whatever rates will be chosen; returns how many runs there will be.

    Raises:
        ConfigError: naming the arm whose settings are impossible.
    """
    grid = study_grid(study)
    for run in grid.conceivable:
        if run.seed == grid.seeds[0]:
            run.config(study.output_dir)
    return grid.total({})


def config_of_run(study: Study, name: str) -> Config:
    """Config of one run of a study, made or not, in a folder of its own.

    Raises:
        ConfigError: if the study has none of that name.
    """
    runs = {run.name: run for run in study_grid(study).conceivable}
    if name not in runs:
        nearest = difflib.get_close_matches(name, runs, n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"--run {name}: the study has no run of that name; it has {len(runs)}, such as {nearest}; its table.md and "
            "runs.csv name them"
        )
    return runs[name].config(str(Path(study.output_dir) / "again" / name))


def run_grid(
    grid: Grid,
    places: Places,
    *,
    done: dict[str, Summary],
    at_once: int | None = None,
    keep_models: bool = False,
) -> dict[str, Summary]:
    """Make the runs that `done` lacks, `at_once` at a time, by default one per core; returns all summaries.

    Some are missing if the process was asked to stop meanwhile; what was under way goes on when asked again.

    Raises:
        FolderError: if the data or the model of two runs differ though their settings say the same.
    """
    done, working = dict(done), list[RunProcess]()
    runs = _made(grid, done)
    check_unchanged_inputs(runs, done, places)
    if not keep_models:
        for run in runs:  # of a study that was killed between a run's summary and this
            drop_weights(run, places)
    with (
        Stop() as stop,
        open_view(f"study {places.runs.parent}", len(runs), grid.total(done), unit="run") as view,
    ):
        try:
            while _start(grid, places, done, working, at_once or cores(), stop):
                time.sleep(POLL_S)
                for process in [process for process in working if process.ended]:
                    working.remove(process)
                    summary = process.take()
                    if summary is None:
                        continue
                    done[process.run.name] = summary
                    check_unchanged_inputs(_made(grid, done), done, places)
                    view.say(f"{process.run.name}: {_outcome(summary)}, {process.seconds:.0f} s")
                    if not keep_models:
                        drop_weights(process.run, places)
                at_work = ", ".join(process.run.name for process in working)
                view.step(len(_made(grid, done)), {"at work": at_work})
        finally:
            for process in working:
                process.kill()
    return done


def _made(grid: Grid, done: dict[str, Summary]) -> list[Trial]:
    """Runs of the grid itself that are there; `done` may have others, of arms that it had once."""
    return [run for run in grid.settled(done) if run.name in done]


def _start(
    grid: Grid, places: Places, done: dict[str, Summary], working: list[RunProcess], at_once: int, stop: Stop
) -> bool:
    """Start what there is room for, or stop all when asked; whether anything is at work."""
    if stop.requested:
        for process in working:
            process.stop()
        return bool(working)
    names = {process.run.name for process in working}
    for run in [run for run in grid.needed(done) if run.name not in names][: at_once - len(working)]:
        working.append(RunProcess(run, places))
    return bool(working)


def _outcome(summary: Summary) -> str:
    return "diverged" if "diverged" in summary else f"dev loss {dev_loss(summary):.4f}"
