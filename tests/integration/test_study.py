"""A study from its file to its tables: killed and asked again, diverging rates, requests that are refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from hosl.cli import main
from hosl.run.record import RunLock

_HOSL = [sys.executable, "-c", "import sys; from hosl.cli import main; sys.exit(main())"]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "studies").glob("*.yaml"))


@pytest.fixture
def tiny_study(tiny_run, tmp_path):
    """`tiny_study(name, **settings)` writes a study over the tiny run and returns its file; its folder is tmp/name."""
    base = yaml.safe_load(tiny_run().read_text())
    for owned in ("output_dir", "method", "client"):
        base.pop(owned)

    def make(name, base_steps=40, **settings):
        base["max_steps"] = base_steps
        study = {
            "output_dir": str(tmp_path / name),
            "base": base,
            "tasks": {"colours": {}},
            "methods": {"frozen": {}, "fo-fo": {"rates": [1.0e-2]}},
            "seeds": [0, 1],
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(study | settings))
        return path

    return make


@pytest.fixture
def one_thread():
    """As the study's own runs: sums of floats depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _lines(folder):
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_killed_study_ends_as_its_commands_do_and_then_only_renders(
    tiny_study, tmp_path, capsys, one_thread
):
    file, folder = tiny_study("killed"), tmp_path / "killed"
    study = subprocess.Popen([*_HOSL, "study", file], stderr=subprocess.DEVNULL)
    while study.poll() is None and not list(folder.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.01)
    study.send_signal(signal.SIGKILL)
    study.wait()
    assert not list(folder.glob("summaries/*.json"))
    half_done = [path.parents[1] for path in folder.glob("runs/*/checkpoints/step-*")]
    before = {run: (run / "record.json").stat().st_mtime_ns for run in half_done}
    assert main(["study", str(file), "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["finished"], done["runs"], done["made"], done["diverged"]) == (True, 4, 4, 0)
    assert before == {
        run: (run / "record.json").stat().st_mtime_ns for run in half_done
    }  # gone on, not begun anew
    assert not [path for path in folder.glob("runs/*/*") if path.name in ("model", "checkpoints")]

    for line in _lines(folder):
        _, verb, config = line["command"].split()
        again = tmp_path / "again" / Path(config).stem
        assert main([verb, config, "--output-dir", str(again)]) == 0
        first = folder / "runs" / Path(config).stem / "metrics.jsonl"
        assert (again / "metrics.jsonl").read_bytes() == first.read_bytes()
    assert main(["study", str(file), "--run", Path(config).stem]) == 0
    again = folder / "again" / Path(config).stem
    assert (again / "metrics.jsonl").read_bytes() == first.read_bytes()
    assert f"hosl study {file} --run " in (folder / "table.md").read_text()

    written = _written(folder)
    assert main(["study", str(file)]) == 0
    assert _written(folder) == written
    assert {Path(name).suffix for name in written} >= {".csv", ".md", ".tex", ".svg", ".html"}


def test_a_study_that_is_asked_to_stop_leaves_runs_to_go_on_with(tiny_study, tmp_path):
    file, folder = tiny_study("stopped", base_steps=4000), tmp_path / "stopped"
    words = [*_HOSL, "study", file]
    study = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while study.poll() is None and not list(folder.glob("runs/*/checkpoints/step-*")):
        time.sleep(0.01)
    study.send_signal(signal.SIGTERM)
    _, err = study.communicate()
    assert study.returncode == 130
    assert f"stopped; go on with: hosl study {file}" in err
    assert not list(folder.glob("summaries/*.json"))
    for checkpoint in folder.glob("runs/*/checkpoints/step-*"):
        with RunLock(checkpoint.parents[1]):
            pass  # nobody is at work in it any more


def test_a_rate_that_diverges_is_recorded_and_never_chosen(tiny_study, tmp_path, capsys):
    study = tiny_study("diverging", seeds=[0], methods={"frozen": {}, "fo-fo": {"rates": [1.0e30]}})
    assert main(["study", str(study)]) == 0
    text = capsys.readouterr().out
    assert "| fo-fo | 1e+30 | 0.01 | diverged at every rate |" in text
    assert "n/a (first-order diverged)" in text
    (line,) = [line for line in _lines(tmp_path / "diverging") if line["row"] == "fo-fo"]
    assert (line["diverged"], line["dev_loss_nats"]) == ("True", "")


def test_another_failure_stops_the_study_with_the_runs_own_line(tiny_study, tmp_path, capsys):
    study = tiny_study("failing", tasks={"colours": {"model": {"cut": 9}}})
    assert main(["study", str(study)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("hosl: run colours-")
    assert "cut=9 is outside 0..3" in err


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_dry_runs(example, capsys, monkeypatch):
    monkeypatch.delenv("HOSL_DATA", raising=False)
    monkeypatch.chdir(example.parents[2])
    assert main(["study", str(example), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    if example.stem == "rate":  # its cells are no runs of `hosl train`
        assert said["cells"] > 0
        return
    assert said["runs"] > 0
    assert said["first_command"].startswith("hosl train runs/studies/")


def test_help_and_dry_run_import_no_torch():
    for words in (["study", "--help"], ["study", str(EXAMPLES[0]), "--dry-run"]):
        script = (
            "import sys\nfrom hosl.cli import main\n"
            f"try: main({words!r})\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
        assert ran.returncode == 0, ran.stderr
