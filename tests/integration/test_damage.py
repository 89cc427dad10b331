"""A run whose files a disk has damaged goes on from what is intact, to the bits of the run that was not damaged."""

import json
import shutil

import pytest
import safetensors.torch
import yaml

from hosl.cli import main
from hosl.training.local_session import LocalSession

ADAMW = {"learning_rate": 1e-2, "optimiser": {"name": "adamw"}}
CASES = {
    "hosl": ("state.json", "client/journal.bin", "client/trained.safetensors", "server/trained.safetensors"),
    "fo-fo": ("client/trained.safetensors", "client/optimiser.safetensors", "server/optimiser.safetensors"),
}
WAYS = (
    lambda data: data[:-1],
    lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
    lambda data: b"",
    lambda data: bytes(len(data)),
)


@pytest.fixture
def interrupted(tiny_run, tmp_path, power_failure):
    """`interrupted(**settings)`: an unharmed run, and the same one as left in step 11, after the saves of 4 and 8."""

    def make(**settings):
        config, whole, broken = str(tiny_run(**settings)), tmp_path / "whole", tmp_path / "broken"
        assert main(["train", config, "--output-dir", str(whole)]) == 0
        with power_failure(LocalSession, 11):
            assert main(["train", config, "--output-dir", str(broken)]) == 1
        assert sorted(p.name for p in (broken / "checkpoints").iterdir()) == [
            "step-00000004",
            "step-00000008",
        ]
        return whole, broken

    return make


def damage(file, way):
    file.write_bytes(WAYS[way](file.read_bytes()))


def exact(run):
    """The metrics, the model, and both halves' state after the last step; a snapshot may be of another step."""
    newest = run / "checkpoints" / "step-00000012"
    names = [str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file() and p.name != "state.json"]
    weights = {
        name: safetensors.torch.load_file(newest / name) if name.endswith("tensors") else (newest / name).read_bytes()
        for name in names
        if name != "client/trained.safetensors" or "client/journal.bin" not in names
    }  # fmt: skip
    as_bytes = {
        name: {key: t.numpy().tobytes() for key, t in value.items()} if isinstance(value, dict) else value
        for name, value in weights.items()
    }
    return (run / "metrics.jsonl").read_bytes(), (run / "model" / "model.safetensors").read_bytes(), as_bytes


@pytest.mark.parametrize("method", CASES)
def test_a_damaged_newest_checkpoint_is_told_and_the_run_ends_with_the_same_bits(
    interrupted, tmp_path, capsys, method
):
    whole, broken = interrupted(
        method=method, server=ADAMW, client={"learning_rate": 1e-3, "trainable": "all"}
    )
    expected = exact(whole)
    for number, name in enumerate(CASES[method]):
        run = tmp_path / f"run-{number}"
        shutil.copytree(broken, run, copy_function=shutil.copy)
        damage(run / "checkpoints" / "step-00000008" / name, number)
        capsys.readouterr()
        assert main(["eval", str(run), "--json"]) == 0  # which changes nothing
        out, err = capsys.readouterr()
        snapshot = method == "hosl" and name == "client/trained.safetensors"
        unneeded = name.endswith("optimiser.safetensors")
        assert json.loads(out)["step"] == (8 if snapshot or unneeded else 4)
        assert (name in err) != unneeded
        assert (run / "checkpoints" / "step-00000008").is_dir()
        assert main(["train", "--resume", str(run)]) == 0
        said = "its journal rebuilds the same weights" if snapshot else "the newest intact one is of step 4"
        assert said in capsys.readouterr().err
        assert exact(run) == expected


def test_with_all_checkpoints_damaged_a_resume_ends_with_one_line_and_deletes_nothing(
    interrupted, tmp_path, capsys
):
    _, run = interrupted()
    for name in ("step-00000004", "step-00000008"):
        damage(run / "checkpoints" / name / "server" / "trained.safetensors", 1)
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    capsys.readouterr()
    for words in (
        ["train", "--resume", str(run)],
        ["eval", str(run)],
        ["export", str(run), str(tmp_path / "out")],
    ):
        assert main(words) == 1
        err = capsys.readouterr().err
        assert "no intact checkpoint is left" in err
        assert "Traceback" not in err
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before


def test_nul_bytes_a_torn_line_and_an_empty_record_are_cut_back_to_the_checkpoint(
    interrupted, tmp_path, capsys
):
    whole, broken = interrupted()
    metrics = [(broken / "metrics.jsonl").read_bytes(), (broken / "timings.jsonl").read_bytes()]
    tails = {
        "nul": b"\0" * 4096,
        "torn": b'{"step": 11, "loss_na',
        "text": b"\xff\xfe\n[1]\n7\n{}\n",
        "none": b"",
    }
    for name, tail in tails.items():
        run = tmp_path / name
        shutil.copytree(broken, run)
        for file, data in zip(("metrics.jsonl", "timings.jsonl"), metrics, strict=True):
            (run / file).write_bytes(data + tail)
        (run / "record.json").write_bytes(b"\0" * 100 if name == "nul" else b"")
        assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 2  # one line, no traceback
        assert "record.json" in capsys.readouterr().err
        assert main(["train", "--resume", str(run)]) == 0
        assert exact(run) == exact(whole)
        assert "record.json was damaged" in capsys.readouterr().err
        assert json.loads((run / "record.json").read_text())["cut"] == 2
        steps = [json.loads(line)["step"] for line in (run / "timings.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 13))


def test_damage_inside_the_metrics_costs_those_lines_and_is_said(interrupted, tmp_path, capsys):
    whole, run = interrupted()
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lost = lines[2]
    lines[2] = bytes(len(lost))
    (run / "metrics.jsonl").write_bytes(b"".join(lines))
    assert main(["train", "--resume", str(run)]) == 0
    assert "lines up to step 8 are missing" in capsys.readouterr().err
    expected = (whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    found = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert json.loads(lost)["step"] == 3
    # the NUL bytes have no line end of their own: the line that follows them is lost, too
    assert found == [line for line in expected if line not in (lost, lines[3])]
    assert (run / "model" / "model.safetensors").read_bytes() == (
        whole / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("gone", ["the folder", "its content"])
def test_a_finished_run_without_checkpoints_is_not_taken_for_the_untrained_model(
    tiny_run, tmp_path, capsys, gone
):
    assert main(["train", str(tiny_run(max_steps=2, method="frozen"))]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    if gone == "its content":
        (tmp_path / "run" / "checkpoints").mkdir()
    run = str(tmp_path / "run")
    capsys.readouterr()
    for words in (["eval", run], ["export", run, str(tmp_path / "out")], ["train", "--resume", run]):
        assert main(words) == 1
        assert "is finished, but its checkpoints are gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("at", "said"),
    [
        (
            "max_steps: 1",
            "lacks num_train_epochs, per_device_train_batch_size, per_device_eval_batch_size and more",
        ),
        ("zo:\n  directions: 2\n", "lacks zo.epsilon, zo.distribution, zo.server_gradient_at and more"),
        ("server:\n  trainable: all\n", "lacks server.learning_rate, server.optimiser.name"),
        ("", "is empty"),
    ],
)
def test_a_run_whose_config_was_cut_in_half_is_refused_and_not_gone_on_with_by_defaults(
    interrupted, tmp_path, capsys, at, said
):
    _, run = interrupted()
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: text.index(at) + len(at)])
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    out = str(tmp_path / "out")
    for words in (["train", "--resume", str(run)], ["eval", str(run)], ["export", str(run), out],
                  ["report", str(run), "-o", out]):  # fmt: skip
        assert main(words) == 2
        err = capsys.readouterr().err
        assert f"config {run / 'config.yaml'} {said}" in err
        assert "put it back" in err
        assert len(err.strip().splitlines()) == 1 or words[0] == "train"
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"} == {
        p: content for p, content in before.items() if p.name != ".lock"
    }
    (run / "config.yaml").write_text(text)
    assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize(
    ("path", "value"),
    [("zo.epsilon", 0.01), ("client.learning_rate", 0.5), ("seed", 3), ("method", "hosl-gradient")],
)
def test_a_config_that_is_not_the_one_of_the_checkpoints_is_named_by_its_setting(
    tiny_run, tmp_path, capsys, path, value
):
    assert main(["train", str(tiny_run(max_steps=4))]) == 0
    run = tmp_path / "run"
    _change(run, path, value)
    for words in (["train", "--resume", str(run), "--max-steps", "6"], ["eval", str(run)],
                  ["export", str(run), str(tmp_path / "out")]):  # fmt: skip
        assert main(words) == 2
        assert f"config.yaml says {path}: {value}, but the run was begun with" in capsys.readouterr().err


def test_settings_that_a_person_may_change_within_a_run_are_taken(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run(max_steps=4))]) == 0
    run = tmp_path / "run"
    model = (tmp_path / "model-in").rename(tmp_path / "model-moved")
    data = (tmp_path / "data.csv").rename(tmp_path / "moved.csv")
    capsys.readouterr()
    changes = {
        "max_steps": 6, "eval_steps": 2, "save_steps": 1, "snapshot_steps": 3, "output_dir": "elsewhere",
        "save_model": False, "save_best": True, "wire.idle_s": 5.0, "model.name": str(model), "task.train": str(data),
        "per_device_eval_batch_size": 16,
    }  # fmt: skip
    for path, value in changes.items():
        _change(run, path, value)
    assert main(["train", "--resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    record = json.loads((run / "record.json").read_text())
    del record["config"]  # a run of version 0.2 has none: nothing is compared
    (run / "record.json").write_text(json.dumps(record))
    _change(run, "zo.epsilon", 0.01)
    assert main(["eval", str(run)]) == 0


def _change(run, path, value):
    config = yaml.safe_load((run / "config.yaml").read_text())
    section = config
    for name in path.split(".")[:-1]:
        section = section[name]
    section[path.split(".")[-1]] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


@pytest.mark.parametrize("way", ["gone", "emptied", "flipped"])
def test_a_run_whose_optimiser_is_lost_is_scored_and_exported_but_not_trained_further(
    tiny_run, tmp_path, capsys, way
):
    client = {"learning_rate": 1e-3, "trainable": "all", "optimiser": {"name": "adamw"}}
    assert main(["train", str(tiny_run(method="fo-fo", max_steps=4, server=ADAMW, client=client))]) == 0
    run = tmp_path / "run"
    assert main(["eval", str(run), "--json", "--split", "test"]) == 0
    before = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("client", "server"):
        file = run / "checkpoints" / "step-00000004" / name / "optimiser.safetensors"
        if way == "gone":
            file.unlink()
        else:
            damage(file, {"emptied": 2, "flipped": 1}[way])
        assert main(["eval", str(run), "--json", "--split", "test"]) == 0
        assert json.loads(capsys.readouterr().out) == before
        assert main(["export", str(run), str(tmp_path / name)]) == 0
        exported = (tmp_path / name / "model.safetensors").read_bytes()
        assert exported == (run / "model" / "model.safetensors").read_bytes()
        capsys.readouterr()
        assert main(["train", "--resume", str(run), "--max-steps", "6"]) == 1
        assert "client/optimiser.safetensors should have" in capsys.readouterr().err


def test_a_checkpoint_is_read_for_its_digests_once(tiny_run, tmp_path, monkeypatch):
    from hosl.system import checkpoint

    assert main(["train", str(tiny_run(max_steps=4))]) == 0
    read, found = [], checkpoint._found
    monkeypatch.setattr(
        checkpoint, "_found", lambda file, *rest: read.append(file.name) or found(file, *rest)
    )
    for words in (["eval"], ["export"], ["train", "--resume"]):
        read.clear()
        more = [str(tmp_path / "out")] if words == ["export"] else []
        assert main([*words, str(tmp_path / "run"), *more]) == 0
        optimisers = ["optimiser.safetensors"] if words[0] == "train" else []
        assert sorted(read) == ["journal.bin", *optimisers, "trained.safetensors"]


def test_a_run_whose_metrics_are_empty_is_scored_exported_and_resumed_by_its_checkpoint(
    tiny_run, tmp_path, capsys
):
    assert main(["train", str(tiny_run(max_steps=4)), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "metrics.jsonl").write_bytes(b"")
    assert main(["eval", str(run), "--split", "test", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["step"] == 4
    for key in ("accuracy", "f1_macro", "loss_nats"):
        assert scores[key] == summary[f"test_{key}"]
    assert main(["export", str(run), str(out)]) == 0
    exported = (out / "model.safetensors").read_bytes()
    assert exported == (run / "model" / "model.safetensors").read_bytes()
    capsys.readouterr()
    assert main(["report", str(run)]) == 2
    assert "metrics.jsonl has no line, but the run has a checkpoint of step 4" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--json"]) == 0
    found, err = capsys.readouterr()
    assert "lines up to step 4 are missing" in err
    assert {key: json.loads(found)[key] for key in ("steps", "test_loss_nats")} == {
        "steps": 4,
        "test_loss_nats": summary["test_loss_nats"],
    }


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("metrics.jsonl", {"loss_nats": "low"}),
        ("metrics.jsonl", {"bytes_up": None}),
        ("timings.jsonl", {"step_s": [1]}),
    ],
)
def test_a_line_of_another_type_is_dropped_by_a_resume_which_ends_with_the_same_weights(
    interrupted, capsys, name, change
):
    whole, run = interrupted()
    lines = (run / name).read_text().splitlines(keepends=True)
    lines[1] = json.dumps(json.loads(lines[1]) | change) + "\n"
    (run / name).write_text("".join(lines))
    assert main(["report", str(run)]) == 2
    assert f"{run / name}, line 2, is damaged" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert ("lines up to step 8 are missing" in capsys.readouterr().err) == (name == "metrics.jsonl")
    steps = [
        json.loads(line)["step"] for line in (run / name).read_text().splitlines() if "split" not in line
    ]
    assert steps == [1, *range(3, 13)]
    assert exact(run)[1:] == exact(whole)[1:]
