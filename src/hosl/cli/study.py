"""`hosl study STUDY.yaml`: many runs as one resumable queue, and the tables and pictures of them."""

import sys
from pathlib import Path
from typing import Any

from hosl.cli.answers import answer, verb_parser
from hosl.errors import ConfigError
from hosl.run.rate_config import RateStudy, is_rate_study, parse_rate_study
from hosl.run.rate_study import missing_cells, run_rate_study
from hosl.run.study import check_runs, config_of_run, first_run, run_study
from hosl.run.study_config import Study, parse_study, read_study


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
    study = _read(known.study)
    if known.dry_run:
        answer(_planned(study), as_json=known.json)
        return 0
    if known.run:
        return _one_run(study, known.run, as_json=known.json)
    if isinstance(study, Study):
        check_runs(study)
    done = (
        run_rate_study(study)
        if isinstance(study, RateStudy)
        else run_study(study, command=f"hosl study {known.study}")
    )
    answer(done, as_json=known.json)
    if not done["finished"]:
        sys.stderr.write(f"stopped; go on with: hosl study {known.study}\n")
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
    config = config_of_run(study, name)

    from hosl.run.train import start  # torch and transformers, only now

    summary = start(config)
    answer(summary, as_json=as_json)
    return 0 if summary["finished"] else 130


def _planned(study: Study | RateStudy) -> dict[str, Any]:
    """What a study would make, its settings checked."""
    if isinstance(study, RateStudy):
        return {"cells": len(missing_cells(study, {})), "problems": ", ".join(study.problems)}
    runs = check_runs(study)
    first, places = first_run(study)
    config = places.config(first)
    return {
        "runs": runs,
        "first_command": places.command(first),
        "method": config.method,
        "model": config.model.name,
    }
