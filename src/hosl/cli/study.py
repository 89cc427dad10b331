"""`hosl study STUDY.yaml`: many runs as one resumable queue, and the tables and pictures of them."""

import shlex
import sys
from pathlib import Path
from typing import Any

from hosl.cli.answers import answer, command_parser, need_torch, say
from hosl.errors import ModelError, RequestError
from hosl.study.config import Study, parse_study, read_study
from hosl.study.process import make_alone
from hosl.study.run import check_runs, config_of_run, first_run, run_study
from hosl.system.machine import cores


def run(words: list[str]) -> int:
    """Make the runs that are missing, then render; progress on standard error. 130 after Ctrl-C."""
    parser = command_parser(
        "study",
        "Run every method on every task with tuned rates and all seeds; go on where a call before has stopped.",
    )
    parser.add_argument("study", help="a YAML file; examples/studies has some")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check every run's settings and say what memory and hours they take; "
        "load no model, make nothing",
    )
    parser.add_argument(
        "--run",
        metavar="NAME",
        help="make this one run again, in a new folder; a study's table names its runs",
    )
    asked = parser.parse_args(words)
    study, command = (
        parse_study(read_study(asked.study), where=asked.study),
        f"hosl study {shlex.quote(asked.study)}",
    )
    if asked.dry_run:
        _dry_run(study, command, as_json=asked.json)
        return 0
    need_torch()
    if asked.run is not None:  # an ordinary run with the settings of one of the study's
        return make_alone(config_of_run(study, asked.run), as_json=asked.json)
    check_runs(study)
    done = run_study(study, file=asked.study, command=command)
    answer(done, as_json=asked.json)
    if not done["finished"]:
        sys.stderr.write(f"stopped; go on with: {command}\n")
        return 130
    if not asked.json:
        sys.stdout.write("\n" + Path(done["table"]).read_text(encoding="utf-8"))
    return 0


def _dry_run(study: Study, command: str, *, as_json: bool) -> None:
    """Say what a study would make and, where PyTorch is installed, what it would take."""
    planned = _planned(study, command)
    try:
        from hosl.study import forecast

        rows = forecast.forecast(study, command, say)
    except (ImportError, RequestError, ModelError) as missing:
        say(f"no forecast of memory and hours: {missing}")
        answer(planned, as_json=as_json)
        return
    at_once = study.at_once or cores()
    if as_json:
        answer(planned | forecast.facts(rows, at_once), as_json=True)
    else:
        answer(planned, as_json=False)
        sys.stdout.write("\n" + forecast.table(rows, at_once))


def _planned(study: Study, command: str) -> dict[str, Any]:
    """Answer of --dry-run: what a study would make, its settings checked."""
    runs = check_runs(study)
    first = first_run(study)
    config = first.config(study.output_dir)
    return {
        "runs": runs,
        "first_command": f"{command} --run {first.name}",
        "method": config.method,
        "model": config.model.name,
    }
