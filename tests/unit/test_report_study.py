"""A study's page: which runs it shows, and that its gap closure is that of the study's own table."""

import csv
import json

import pytest

from hosl.errors import FolderError
from hosl.report.build import write_study_report
from hosl.report.runs import run_folders
from tests.unit import test_report

made, _checked = test_report.made, test_report._checked


def _finish(study, rows, *, command="hosl train x/configs/{}.yaml"):
    """Write runs.csv: name of a run -> (row, whether it was chosen)."""
    with (study / "runs.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["task", "row", "chosen", "command"])
        lines.writerows(["t", row, chosen, command.format(name)] for name, (row, chosen) in rows.items())


def test_a_study_shows_its_chosen_runs(made, tmp_path):
    for name, method in (("a-0.1-seed0", "hosl"), ("a-0.2-seed0", "hosl"), ("b-seed0", "frozen")):
        made(name, method, seed=2 if "0.2" in name else 0)
    (tmp_path / "runs" / "a-0.1-seed0.log").write_text("")
    assert len(run_folders([tmp_path])) == 3
    assert "The study is not finished" in _checked(write_study_report(tmp_path))
    rows = {"a-0.2-seed0": ("a", True), "a-0.1-seed0": ("a", False), "b-seed0": ("b", True)}
    for command in ("hosl train x/configs/{}.yaml", "OMP_NUM_THREADS=1 hosl train 'a study/configs/{}.yaml'"):
        _finish(tmp_path, rows, command=command)
        assert [folder.name for folder in run_folders([tmp_path, tmp_path])] == ["a-0.2-seed0", "b-seed0"]
    assert "chosen by dev loss on the first seed" in _checked(write_study_report(tmp_path))


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("t,a,Tr", r"runs\.csv lacks a part of line 3: it was cut short"),
        ("t,a,True,hosl train x/configs/a-0", r"runs\.csv has no whole command in line 3"),
        (
            "t,a,True,hosl train x/configs/gone.yaml",
            "has gone as chosen, which is not in .*call `hosl study` again",
        ),
        (None, r"runs\.csv has no chosen run"),
    ],
)
def test_a_list_of_runs_that_is_cut_short_or_stale_is_refused(made, tmp_path, ending, said):
    made("a")
    _finish(tmp_path, {"a": ("a", True)} if ending else {})
    with (tmp_path / "runs.csv").open("a") as file:
        file.write(ending or "")
    with pytest.raises(FolderError, match=said):
        write_study_report(tmp_path)


@pytest.mark.parametrize("reference", ["fo-fo", "fo-recompute"])
def test_gap_closure_of_a_study_is_between_the_rows_that_it_names(made, tmp_path, reference):
    own = {"client": {"optimiser": {"name": "adamw"}}} if reference == "fo-fo" else {}
    kinds = {
        "still": ("frozen", {}), "mine": ("hosl-node", {}), "best": (reference, own),
        "better": ("fo-fo", {"client": {"learning_rate": 0.5}}),
    }  # fmt: skip
    rows = {}
    for row, (method, settings) in kinds.items():
        for seed in (0, 1):
            made(f"{row}-{seed}", method, seed=seed, **settings)
            rows[f"{row}-{seed}"] = (row, True)
    _finish(tmp_path, rows)
    for path in (tmp_path / "runs").glob("better-*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line | ({"loss_nats": 0.1, "accuracy": 0.9} if "split" in line else {}) for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_study_report(tmp_path, reference_rows=("still", "best"))
    first = page.read_text()
    assert first.count("0.33<small>[0.33, 0.33]") == 2  # (0.6 - 0.5) / (0.8 - 0.5), of accuracy and of loss
    assert f"(method - frozen) / ({reference}" in first
    assert write_study_report(tmp_path).read_text() == first  # by `hosl report`, which knows the folder alone
    (tmp_path / "reference_rows.json").write_text("{")
    with pytest.raises(FolderError, match="call `hosl study` again"):
        write_study_report(tmp_path)
