"""A study from its file to its tables: killed and asked again, diverging rates, requests that are refused."""

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
import yaml

from hosl.cli import main
from hosl.system.run_folder import RunLock

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


def _lines(folder):
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def _written(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_killed_study_ends_as_its_commands_do_and_then_only_renders(
    tiny_study, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # sums of floats depend on it; every command says its own
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

    *_, line = _lines(folder)
    threads, _, verb, config = line["command"].split()
    name, again = Path(config).stem, tmp_path / "again"
    words = [*_HOSL, verb, config, "--output-dir", again]
    subprocess.run(words, env=os.environ | dict([threads.split("=")]), check=True, stderr=subprocess.DEVNULL)
    assert main(["study", str(file), "--run", name]) == 0
    first = (folder / "runs" / name / "metrics.jsonl").read_bytes()
    for made in (again, folder / "again" / name):
        assert (made / "metrics.jsonl").read_bytes() == first
        assert json.loads((made / "record.json").read_text())["machine"]["threads"] == 1
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
    assert "| fo-fo | 1e+30 | 0.01 | diverged at every rate |" in capsys.readouterr().out
    (line,) = [line for line in _lines(tmp_path / "diverging") if line["row"] == "fo-fo"]
    assert (line["diverged"], line["dev_loss_nats"]) == ("True", "")


@pytest.mark.parametrize(
    ("setting", "value", "status", "kind"),
    [("--client.learning-rate", "1e30", 3, "NonFiniteError"), ("--model.cut", "9", 2, "SplitError")],
)
def test_a_run_that_fails_says_its_kind_of_failure_in_json_and_status(
    tiny_run, capsys, setting, value, status, kind
):
    assert main(["train", str(tiny_run()), "--method", "fo-fo", setting, value, "--json"]) == status
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert error["kind"] == kind
    assert err.endswith(f"hosl: {error['message']}\n")


def test_another_failure_stops_the_study_with_the_runs_own_line(tiny_study, tmp_path, capsys):
    study = tiny_study("failing", tasks={"colours": {"model": {"cut": 9}}})
    assert main(["study", str(study)]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("hosl: run colours-")
    assert "cut=9 is outside 0..3" in err


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_dry_runs(example, capsys, monkeypatch):
    monkeypatch.delenv("HOSL_DATA", raising=False)
    monkeypatch.setattr("hosl.study.forecast.forecast", lambda *words: [])  # a minute for each
    monkeypatch.chdir(example.parents[2])
    assert main(["study", str(example), "--dry-run", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["runs"] > 0
    assert said["first_command"].startswith(f"hosl study {example} --run ")


def test_the_first_command_can_be_pasted_before_the_study_has_run(tiny_study, tmp_path, capsys):
    file = tiny_study("plain").rename(tmp_path / "my study.yaml")
    assert main(["study", str(file), "--dry-run", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["first_command"]
    assert shlex.split(command) == ["hosl", "study", str(file), "--run", "colours-fo-fo-0.01-0.01-seed0"]


def test_a_run_without_a_name_is_none_of_the_study(tiny_study, tmp_path, capsys):
    assert main(["study", str(tiny_study("nameless")), "--run", ""]) == 2
    assert "the study has no run of that name" in capsys.readouterr().err
    assert not (tmp_path / "nameless").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [([], "go on with the same `hosl study`"), (["--run", "x"], "go on with `hosl train --resume RUN`")],
)
def test_a_second_ctrl_c_says_how_a_study_goes_on(tiny_study, capsys, monkeypatch, more, said):
    def interrupted(*args, **settings):
        raise KeyboardInterrupt

    for made in ("run_study", "config_of_run"):
        monkeypatch.setattr(f"hosl.cli.study.{made}", interrupted)
    assert main(["study", str(tiny_study("interrupted")), *more]) == 130
    assert capsys.readouterr().err == f"hosl: interrupted; {said}\n"


def test_help_imports_no_torch_and_a_dry_run_can_do_without():
    without = "sys.modules['torch'] = None\n"
    for words, before in ((["study", "--help"], ""), (["study", str(EXAMPLES[0]), "--dry-run"], without)):
        script = (
            f"import sys\n{before}from hosl.cli import main\n"
            f"try: main({words!r})\nexcept SystemExit: pass\n"
            "assert not sys.modules.get('torch') and 'matplotlib' not in sys.modules"
        )
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ)
        assert ran.returncode == 0, ran.stderr
        assert not before or ("no forecast of memory and hours" in ran.stderr and "runs: " in ran.stdout)


def test_a_dry_run_says_memory_hours_and_commands_as_a_plan_does(tiny_study, tmp_path, capsys):
    """Both of two tasks of one length have the figures of `hosl plan` for the config of the row's first run."""
    file = tiny_study("planned", tasks={"colours": {}, "again": {}}, seeds=[0, 1, 2], at_once=2)
    assert main(["study", str(file), "--dry-run", "--json"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert err.count("planning ") == 2
    rows = {row["row"]: row for row in said["rows"]}
    assert [row["runs"] for row in rows.values()] == [3, 3, 3, 3]
    assert said["hours"] == pytest.approx(sum(row["hours"] for row in rows.values()) / 2)
    assert shlex.split(rows["again-fo-fo"]["command"])[-2:] == ["--run", "again-fo-fo-0.01-0.01-seed0"]
    config = tmp_path / "row.yaml"
    settings = yaml.safe_load(file.read_text())["base"] | {
        "method": "fo-fo",
        "client": {"learning_rate": 1e-2},
    }
    config.write_text(yaml.safe_dump(settings))
    assert main(["plan", str(config), "--json", "--ways", "fo-fo", "--cuts", "2"]) == 0
    (way,) = json.loads(capsys.readouterr().out)["ways"]
    for name in ("colours-fo-fo", "again-fo-fo"):
        row = rows[name]
        for side in ("client", "server"):
            assert row[f"{side}_tensor_peak_bytes"] == way[f"{side}_tensor_peak_bytes"]
        assert row["step_s"] == pytest.approx(way["client_s"] + way["server_s"], abs=1e-3)
        assert row["hours"] == pytest.approx(row["step_s"] * 40 * 3 / 3600)


def test_a_dry_run_says_why_it_could_not_read_the_rows(tiny_study, capsys):
    missing = {"train": "not-yet.csv", "max_tokens": 9}
    assert main(["study", str(tiny_study("early", tasks={"colours": {"task": missing}})), "--dry-run"]) == 0
    out, err = capsys.readouterr()
    (reason,) = [line for line in err.splitlines() if line.endswith("; planned by rows of 9 tokens")]
    assert "not-yet.csv" in reason
    assert " hours, evaluations apart" in out


@pytest.mark.parametrize("kind", ["full", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dry", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_study_of_opt_125m_is_ready_for_it(hosl_data, tmp_path, capsys, kind, dry):
    """With random weights of two layers, OPT's own tokenizer and real rows of SST-2: every row, one rate, two steps."""
    model, example = tmp_path / "opt", next(path for path in EXAMPLES if path.stem == f"opt-125m-{kind}")
    shutil.copytree(hosl_data / "data" / "tokenizers" / "opt", model)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    transformers.OPTForCausalLM(transformers.OPTConfig(num_attention_heads=4, **sizes)).save_pretrained(model)
    study = yaml.safe_load(example.read_text())
    base = study["base"]
    base["model"] = {"name": str(model), "cut": 1}
    base["task"] |= {"train_rows": 16, "dev_rows": 8, "test_rows": 8, "max_tokens": 48}
    base["client"]["device"] = base["server"]["device"] = "cpu"
    base |= {"max_steps": 2, "per_device_train_batch_size": 4, "eval_steps": 2, "save_steps": 2}
    for row in study["methods"].values():
        row |= {"rates": row["rates"][:1]} if "rates" in row else {}
    study |= {"output_dir": str(tmp_path / "out"), "tasks": {"SST-2": study["tasks"]["SST-2"]}, "seeds": [0]}
    study["server_learning_rates"] = [1.0e-5]
    file = tmp_path / example.name
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    assert main(["study", str(file), "--json", *(["--dry-run"] if dry else [])]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    if dry:
        assert "is not here" not in err
        assert [row["row"] for row in said["rows"]] == [f"SST-2-{name}" for name in study["methods"]]
        assert min(row["client_tensor_peak_bytes"] for row in said["rows"]) > 0
        assert min(row["hours"] for row in said["rows"]) > 0
    else:
        assert said["finished"]
        lines = _lines(tmp_path / "out")
        assert {line["row"] for line in lines} == set(study["methods"])
        assert all(0 < float(line["dev_loss_nats"]) < 12 for line in lines)
