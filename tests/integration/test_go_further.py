"""A run after its end: trained further, scored and exported from another folder, with less on the disk if asked."""

import json
import shutil
from dataclasses import replace

import pytest
import safetensors.torch
import yaml

from hosl.cli import main
from hosl.system.run_folder import read_lines
from hosl.training.local_session import LocalSession

ADAMW = {"learning_rate": 1e-2, "optimiser": {"name": "adamw"}}


def exact(run):
    newest = max((run / "checkpoints").glob("step-*"))
    names = ["metrics.jsonl", "model/model.safetensors"]
    names += [str(p.relative_to(run)) for p in newest.rglob("*") if p.is_file()]
    return {name: (run / name).read_bytes() for name in names}


@pytest.mark.parametrize("method", [pytest.param("hosl", marks=pytest.mark.slow), "fo-fo"])
def test_a_finished_run_trained_further_is_the_longer_run_bit_for_bit(tiny_run, tmp_path, capsys, method):
    client = {"learning_rate": 1e-3, "trainable": "all"}
    config = str(tiny_run(method=method, eval_steps=4, server=ADAMW, client=client))
    assert main(["train", config, "--output-dir", str(tmp_path / "long")]) == 0
    run = tmp_path / "run"
    assert main(["train", config, "--max-steps", "8"]) == 0
    short = exact(run)
    begun = (run / "config.yaml").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max-steps", "12", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 12
    assert exact(run) == exact(tmp_path / "long") != short
    assert yaml.safe_load((run / "config.yaml").read_text())["max_steps"] == 12
    assert (run / "config.yaml").stat().st_mtime_ns == begun  # by which reports order runs

    after = exact(run)
    assert main(["train", "--resume", str(run), "--max-steps", "10"]) == 2
    assert "has done 12 steps" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--max-steps", "20", "--seed", "3"]) == 2
    assert "keeps the run's own settings" in capsys.readouterr().err
    assert exact(run) == after


def test_a_run_is_scored_resumed_and_exported_from_anywhere(tiny_run, tmp_path, monkeypatch, capsys):
    file = tiny_run(max_steps=4)
    settings = yaml.safe_load(file.read_text())
    settings["model"]["name"], settings["task"]["train"], settings["output_dir"] = (
        "model-in",
        "data.csv",
        "run",
    )
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    assert main(["train", file.name]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert main(["eval", "../moved"]) == 0
    assert main(["train", "--resume", "../moved"]) == 0

    (tmp_path / "data.csv").unlink()
    assert main(["export", "../moved", "exported"]) == 0
    exported = tmp_path / "elsewhere" / "exported"
    for name in ("model.safetensors", "config.json"):
        assert (exported / name).read_bytes() == (tmp_path / "moved" / "model" / name).read_bytes()
    capsys.readouterr()
    assert main(["eval", "../moved"]) == 2  # which does need the data
    assert "data.csv: no such file" in capsys.readouterr().err


def test_an_export_still_refuses_another_model(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run(max_steps=2))]) == 0
    weights = tmp_path / "model-in" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    name = next(iter(tensors))
    safetensors.torch.save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 1
    assert "was trained with another model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_model_and_optimiser_are_left_out_on_request(tiny_run, tmp_path, capsys):
    client = {"learning_rate": 1e-2, "trainable": "all"}
    config = str(tiny_run(method="fo-fo", client=client | {"optimiser": {"name": "adamw"}}, server=ADAMW))
    words = ["train", config, "--output-dir"]
    assert main([*words, str(tmp_path / "all")]) == 0
    run = tmp_path / "less"
    assert main([*words, str(run), "--no-save-model", "--no-save-optimiser"]) == 0
    assert not (run / "model").exists()
    names = {p.name for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert names == {"state.json", "trained.safetensors"}
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "all" / "metrics.jsonl").read_bytes()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    model = tmp_path / "all" / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model.read_bytes()
    assert main(["eval", str(run)]) == 0
    before = (run / "config.yaml").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "--max-steps", "14"]) == 1
    assert "without its optimisers' state (save_optimiser: false)" in capsys.readouterr().err
    assert (run / "config.yaml").read_bytes() == before


def test_a_second_run_says_its_folder_and_the_config_names_the_newest(tiny_run, tmp_path, capsys):
    config, folder = str(tiny_run(max_steps=2)), tmp_path / "run"
    assert main(["eval", config]) == 2
    assert "there is no run in its output_dir" in capsys.readouterr().err
    assert main(["train", config]) == 0
    assert "is taken" not in capsys.readouterr().err
    assert main(["train", config, "--seed", "1"]) == 0
    assert f"output_dir {folder} is taken; this run is {folder}-2" in capsys.readouterr().err
    for command in (
        ["eval", config],
        ["export", config, str(tmp_path / "out")],
        ["train", "--resume", config],
    ):
        assert main([*command, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["run"] == f"{folder}-2"
        assert f"the newest run of {config} is {folder}-2" in err
    page = tmp_path / "page.html"
    assert main(["report", config, "-o", str(page)]) == 0
    assert main(["report", f"{folder}-2", "-o", str(tmp_path / "same.html")]) == 0
    assert page.read_bytes() == (tmp_path / "same.html").read_bytes()


@pytest.mark.parametrize(("epochs", "steps"), [(1, 10), (1.5, 15), (0.1, 1)])
def test_epochs_count_the_training_rows(tiny_run, tmp_path, capsys, epochs, steps):
    config = str(tiny_run(num_train_epochs=epochs, method="frozen", client={}, zo={}))
    assert main(["train", config, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "77 train" in err  # in batches of 8
    assert json.loads(out)["steps"] == steps
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == steps


def test_epochs_that_cannot_be_are_refused(tiny_run, tmp_path, capsys):
    for wrong in ("0", "-1", "nan"):
        assert main(["train", str(tiny_run()), "--num-train-epochs", wrong]) == 2
        assert "num_train_epochs must " in capsys.readouterr().err
    assert main(["train", str(tiny_run(warmup_steps=11)), "--num-train-epochs", "1"]) == 2
    assert "warmup_steps must lie in 0..max_steps=10" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["hosl", "fo-fo"])
def test_the_best_weights_on_dev_are_kept_on_request(tiny_run, tmp_path, capsys, monkeypatch, method):
    """Whatever the evaluations say: here the second of four is the best, the run stops, and goes on."""
    from hosl.training import loop

    given = {3: 0.5, 6: 0.75, 9: 0.75, 12: 0.25}
    scored, at = loop.evaluate, []

    def evaluated(client, server, task, examples, **how):
        found = scored(client, server, task, examples, **how)
        return found if examples is task.test else replace(found, accuracy=given[at[-1]])

    def noted(session, step):
        at.append(step)
        session.step = step
        if step == stop_at and stop_at not in stopped:
            stopped.append(step)
            raise OSError("the power fails here")

    client = {"learning_rate": 1e-2, "trainable": "all"}
    config = str(
        tiny_run(method=method, server=ADAMW, client=client, eval_steps=3, save_steps=4, save_best=True)
    )
    monkeypatch.setattr(loop, "evaluate", evaluated)
    monkeypatch.setattr(LocalSession, "done", noted)
    stop_at, stopped, run = 7, [], tmp_path / "run"
    assert main(["train", config]) == 1
    assert [p.name for p in (run / "best").iterdir()] == ["step-00000006"]
    assert main(["train", "--resume", str(run)]) == 0
    best = [line for line in read_lines(run / "metrics.jsonl") if line.get("split") == "dev"]
    (kept,) = (run / "best").iterdir()
    expected = max(best, key=lambda line: (line["accuracy"], -line["loss_nats"]))["step"]
    assert kept.name == f"step-{expected:08d}"
    assert expected in (6, 9)

    assert (
        main(["train", config, "--max-steps", str(expected), "--output-dir", str(tmp_path / "ends-there")])
        == 0
    )
    assert main(["export", str(run), str(tmp_path / "out"), "--best"]) == 0
    whole = tmp_path / "ends-there" / "model" / "model.safetensors"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert main(["eval", str(run), "--best", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == expected


@pytest.mark.parametrize("way", ["whole", "emptied", "without evaluations"])
def test_the_best_weights_are_those_of_the_whole_run_though_its_metrics_were_lost(
    tiny_run, tmp_path, capsys, monkeypatch, power_failure, way
):
    from hosl.training import loop

    given, scored = iter((0.5, 0.9, 0.75, 0.25)), loop.evaluate

    def evaluated(client, server, task, examples, **how):
        found = scored(client, server, task, examples, **how)
        return found if examples is task.test else replace(found, accuracy=next(given))

    monkeypatch.setattr(loop, "evaluate", evaluated)
    run = tmp_path / "run"
    with power_failure(LocalSession, 8):
        assert main(["train", str(tiny_run(eval_steps=3, save_steps=7, save_best=True))]) == 1
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    left = {
        "whole": lines,
        "emptied": [],
        "without evaluations": [line for line in lines if b"dev" not in line],
    }
    (run / "metrics.jsonl").write_bytes(b"".join(left[way]))
    assert main(["train", "--resume", str(run)]) == 0
    assert [p.name for p in (run / "best").iterdir()] == ["step-00000006"]
    assert "are not known" not in capsys.readouterr().err


def test_a_run_of_a_version_that_kept_no_best_evaluation_says_that_it_is_not_known(
    tiny_run, tmp_path, capsys, power_failure
):
    run = tmp_path / "run"
    with power_failure(
        LocalSession, 8
    ):  # without save_best its checkpoint says as little as one of that version
        assert main(["train", str(tiny_run(eval_steps=3, save_steps=7))]) == 1
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("best: false", "best: true"))
    (run / "metrics.jsonl").write_bytes(b"")
    assert main(["train", "--resume", str(run)]) == 0
    assert "save_best: evaluations up to step 7 are not known" in capsys.readouterr().err


def test_a_run_without_best_weights_says_so(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run(max_steps=2))]) == 0
    assert main(["eval", str(tmp_path / "run"), "--best"]) == 2
    assert "has no best weights" in capsys.readouterr().err
