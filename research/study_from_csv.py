"""Go on with a study whose folder is gone: write the summaries of its runs back, from the lines of its runs.csv.

`hosl study` then makes only what is missing, and `--csv` writes the lines of everything that is there, in the form in
which docs/results keeps them: without commands, which name folders of one machine.

    python research/study_from_csv.py STUDY.yaml RUNS.csv --output-dir OUT
    hosl study STUDY.yaml  # with output_dir: OUT
    python research/study_from_csv.py STUDY.yaml RUNS.csv --output-dir OUT --csv
"""

import argparse
import csv
import json
from pathlib import Path

import msgspec

from hosl.study.config import Study, parse_study, read_study, study_grid, study_groups
from hosl.study.files import Places, read_summaries
from hosl.study.grid import Trial
from hosl.study.runs_csv import METRICS, csv_of, run_lines
from hosl.system.atomic import whole_file


def main() -> None:
    """Read or write the file, as the command says."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("study", type=Path, help="YAML file of the study")
    arguments.add_argument("csv_file", type=Path, help="its runs.csv, read; with --csv written")
    arguments.add_argument("--output-dir", type=Path, required=True, help="the study's folder")
    arguments.add_argument("--csv", action="store_true", help="write the file, from the folder")
    given = arguments.parse_args()
    study = parse_study(read_study(given.study), where=str(given.study))
    study = msgspec.structs.replace(study, output_dir=str(given.output_dir))
    if given.csv:
        write_csv(study, given.csv_file)
    else:
        write_summaries(study, given.csv_file)


def write_summaries(study: Study, csv_file: Path) -> None:
    """Write the summary of every line whose row the study has and whose summary is not there."""
    places = Places.below(Path(study.output_dir))
    places.summaries.mkdir(parents=True, exist_ok=True)
    rows = {(group.task, name): arm for group in study_groups(study) for name, arm in group.arms.items()}
    arms = {arm.name: arm for arm in study_grid(study).arms}
    written = 0
    for line in csv.DictReader(csv_file.read_text("utf-8").splitlines()):
        arm = arms.get(rows.get((line["task"], line["row"]), ""))
        if arm is None:
            print(f"left out: {line['task']} {line['row']}, which {csv_file} has and the study has not")
            continue
        run = Trial(arm, float(line["client_rate"]), float(line["server_rate"]), int(line["seed"]))
        if places.summary_file(run).is_file():
            continue
        whole_file(places.summary_file(run), json.dumps(summary_of(line, run, places)).encode())
        written += 1
    print(f"{written} summaries written to {places.summaries}")


def summary_of(line: dict[str, str], run: Trial, places: Places) -> dict[str, object]:
    """Summary of a finished run from its line, which has only the last point of its dev curve, and no digests."""
    said: dict[str, object] = {name: json.loads(line[name]) for name in METRICS if line[name]}
    if line["diverged"] == "True":  # whoever reads looks for the key, not for what it holds
        said["diverged"] = "diverged"
    curve = [[said["steps"], said["dev_loss_nats"], said["dev_accuracy"]]] if "dev_loss_nats" in said else []
    return said | {
        "row": run.arm.name, "rate": run.rate, "server_rate": run.server_rate, "seed": run.seed,
        "command": places.command(run), "config": msgspec.to_builtins(places.config(run)),
        "versions": {name: line[name] for name in ("hosl", "torch", "machine")}, "dev_curve": curve,
    }  # fmt: skip


def write_csv(study: Study, csv_file: Path) -> None:
    """Write the line of every run that is there, chosen or not."""
    grid, places = study_grid(study), Places.below(Path(study.output_dir))
    done = read_summaries(grid, places)
    made = [done[run.name] for run in grid.settled(done) if run.name in done]
    made += [
        run for name, run in done.items() if run not in made and run["row"] in {arm.name for arm in grid.arms}
    ]
    chosen = grid.chosen(done)
    lines = run_lines(study_groups(study), made, chosen)
    for line, run in zip(lines, made, strict=True):
        del line["command"]
        if run["row"] not in chosen:  # which of them the table will show is not known yet
            line |= {name: run.get(name) for name in ("test_accuracy", "test_loss_nats")}
    whole_file(csv_file, csv_of(lines))
    print(f"{len(lines)} lines written to {csv_file}")


if __name__ == "__main__":
    main()
