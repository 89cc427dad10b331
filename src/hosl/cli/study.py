"""`hosl study STUDY.yaml`: many runs as one resumable queue, and the tables and pictures of them."""

import shlex
import sys
from pathlib import Path
from typing import Any

from hosl.cli.answers import answer, verb_parser
from hosl.errors import ConfigError
from hosl.run.rate_config import RateStudy, is_rate_study, parse_rate_study
from hosl.run.rate_study import missing_cells, run_rate_study
from hosl.run.study import check_runs, config_of_run, first_run, run_study
from hosl.run.study_config import Study, parse_study, read_study
from hosl.run.study_process import make_alone


def run(words: list[str]) -> int:
    """Make the runs that are missing, then render; progress on standard error. 130 after Ctrl-C."""
    parser = verb_parser(
        "study",
        "Run every method on every task with tuned rates and all seeds; go on where a call before has stopped.",
    )
    parser.add_argument("study", help="a YAML file; examples/studies has some")
    parser.add_argument(
        "--dry-run", action="store_true", help="check every run's settings, load no model, make nothing"
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="make this one run again, in a new folder; a study's table names its runs",
    )
    known = parser.parse_args(words)
    study, command = _read(known.study), f"hosl study {shlex.quote(known.study)}"
    if known.dry_run:
        answer(_planned(study, command), as_json=known.json)
        return 0
    if known.run is not None:
        return _one_run(study, known.run, as_json=known.json)
    if isinstance(study, Study):
        check_runs(study)
    done = (
        run_rate_study(study)
        if isinstance(study, RateStudy)
        else run_study(study, file=known.study, command=command)
    )
    answer(done, as_json=known.json)
    if not done["finished"]:
        sys.stderr.write(f"stopped; go on with: {command}\n")
        return 130
    if not known.json:
        sys.stdout.write("\n" + Path(done["table"]).read_text(encoding="utf-8"))
    return 0


def _read(path: str) -> Study | RateStudy:
    content = read_study(path)
    return (parse_rate_study if is_rate_study(content) else parse_study)(content, where=path)


def _one_run(study: Study | RateStudy, name: str, *, as_json: bool) -> int:
    """An ordinary run with the settings of one of the study's; 130 after Ctrl-C."""
    if isinstance(study, RateStudy):
        raise ConfigError("--run is for studies of runs; this one's cells are no runs: leave --run out")
    return make_alone(config_of_run(study, name), as_json=as_json)


def _planned(study: Study | RateStudy, command: str) -> dict[str, Any]:
    """What a study would make, its settings checked."""
    if isinstance(study, RateStudy):
        return {"cells": len(missing_cells(study, {})), "problems": ", ".join(study.problems)}
    runs = check_runs(study)
    first = first_run(study)
    config = first.config(study.output_dir)
    return {
        "runs": runs,
        "first_command": f"{command} --run {first.name}",
        "method": config.method,
        "model": config.model.name,
    }
