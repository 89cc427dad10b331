"""`hosl study STUDY.yaml`: many runs as one resumable queue, and the tables and pictures of them."""

import sys
from pathlib import Path

from hosl.cli.answers import answer, verb_parser
from hosl.run.study import check_runs, first_run, run_study
from hosl.run.study_config import load_study


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
    known = parser.parse_args(words)
    study = load_study(known.study)
    runs = check_runs(study)
    if known.dry_run:
        first, places = first_run(study)
        config = places.config(first)
        found = {
            "runs": runs,
            "first_command": places.command(first),
            "method": config.method,
            "model": config.model.name,
        }
        answer(found, as_json=known.json)
        return 0
    done = run_study(study)
    answer(done, as_json=known.json)
    if not done["finished"]:
        sys.stderr.write(f"stopped; go on with: hosl study {known.study}\n")
        return 130
    if not known.json:
        sys.stdout.write("\n" + Path(done["table"]).read_text(encoding="utf-8"))
    return 0
