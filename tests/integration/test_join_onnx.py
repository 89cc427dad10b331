"""A device without torch over loopback TLS: `hosl join` on ONNX Runtime beside the same run on torch."""

import json
import re
import shutil
import signal
from hashlib import sha256

import msgspec
import onnx
import pytest
import safetensors.torch
import torch
import yaml

from hosl.cli import main
from hosl.split.reading.runtime_json import RuntimeFacts, content_digest
from tests.integration.devices import (
    ADAPTED_WORDS,
    HERE,
    RUNS,
    WORDS,
    classifier_halves,
    joining,
    losses,
    split_with_graphs,
    write_config,
)
from tests.integration.network import Server, enrol, finished, join, newest


@pytest.fixture(scope="module")
def made(tmp_path_factory, pytestconfig):
    """A folder with data.csv and halves of a tiny classifier, with graphs of plain weights."""
    return classifier_halves(pytestconfig, tmp_path_factory.mktemp("device"), WORDS)


@pytest.fixture(scope="module")
def adapted(made, pytestconfig):
    """The same halves with the graphs of adapters and of an int8 base, too."""
    return split_with_graphs(pytestconfig, made / "model-in", made / "adapted", *ADAPTED_WORDS)


@pytest.fixture(scope="module")
def server(made):
    with Server(made / "halves" / "server", made / "service") as serving:
        yield serving


RARER = RUNS.keys() - {"hosl-gradient", "hosl-residual", "fo-blocks"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in RARER else []) for name in RUNS]
)
def test_a_run_without_torch_is_that_of_torch(made, server, tmp_path, name, request):
    halves = request.getfixturevalue("adapted") if "lora" in name else made / "halves"
    config = write_config(tmp_path / "config.yaml", made, **RUNS[name])
    here = finished(joining(halves, server.line, config, tmp_path / "onnx"))
    there = finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "torch"))
    assert here["steps"] == there["steps"] == 6
    ours, theirs = losses(tmp_path / "onnx"), losses(tmp_path / "torch")
    assert len(ours) == len(theirs) == 6 + 2 + 1
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] != ours[2] != ours[5]
    record = json.loads((tmp_path / "onnx" / "record.json").read_text())
    assert record["runtime"]["name"] == "onnx"
    assert re.fullmatch(r"onnxruntime \d+\.\d+\.\d+", record["runtime"]["engine"])
    assert record["versions"]["torch"] != "absent"  # it is there, and was not used
    same_files(tmp_path / "onnx", tmp_path / "torch")


def same_files(ours, theirs):
    """Both runs leave the same files with tensors of the same names, shapes and dtypes."""
    ours, theirs = (newest(run / "checkpoints") / "client" for run in (ours, theirs))
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for file in ours.glob("*.safetensors"):
        a, b = safetensors.torch.load_file(file), safetensors.torch.load_file(theirs / file.name)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
        if file.name == "trained.safetensors":
            assert all((a[n] - b[n]).abs().max() <= 1e-4 * b[n].abs().max().clamp(min=1) for n in a)


KILLS = [("hosl", "Losses", 7, "after"), ("fo-blocks", "Step", 5, "after")]
"""The method, and the message at which the device is killed; each is after the first checkpoint."""


@pytest.mark.parametrize(
    ("name", "call", "number", "when"),
    [pytest.param(*kill, marks=[pytest.mark.slow] if kill[0] in RARER else [], id=kill[0]) for kill in KILLS],
)
def test_a_killed_device_ends_where_it_would_have_ended(
    made, server, tmp_path, capfd, name, call, number, when
):
    """The second command runs where torch is installed: a run goes on in its own runtime unless told otherwise."""
    config = write_config(tmp_path / "config.yaml", made, **RUNS[name])
    whole = finished(joining(made / "halves", server.line, config, tmp_path / "whole"))
    dying = [HERE / "dying_client.py", call, number, when]
    killed = joining(made / "halves", server.line, config, tmp_path / "killed", program=dying)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    again = join(made / "halves" / "client", server.line, config, "--output-dir", tmp_path / "killed")
    out, err = again.communicate(timeout=120)
    assert again.returncode == 0, err
    assert "so far and goes on by" not in err
    assert json.loads(out.splitlines()[-1])["client_digest"] == whole["client_digest"]
    assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_without_a_method_the_engine_takes_exact_gradients_and_says_so(made, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", made, max_steps=2)
    settings = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({k: v for k, v in settings.items() if k not in ("method", "zo")}))
    process = joining(made / "halves", server.line, config, tmp_path / "run")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["method"] == "fo-recompute"
    assert (
        len([line for line in err.splitlines() if line.startswith("no method is named: fo-recompute")]) == 1
    )
    again = finished(
        joining(made / "halves", server.line, config, tmp_path / "run")
    )  # the same run, finished
    assert again["finished"]
    assert not (tmp_path / "run-2").exists()
    named = finished(joining(made / "halves", server.line, config, tmp_path / "named", "--method", "frozen"))
    assert named["method"] == "frozen"


def test_a_run_that_changes_its_runtime_says_so_and_ends_near_to_the_same(made, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", made, **RUNS["fo-blocks"])
    finished(joining(made / "halves", server.line, config, tmp_path / "whole"))
    dying = [HERE / "dying_client.py", "Step", 5, "before"]
    joining(made / "halves", server.line, config, tmp_path / "moved", program=dying).communicate(timeout=120)
    words = ["--output-dir", tmp_path / "moved", "--runtime", "torch"]
    moved = join(made / "halves" / "client", server.line, config, *words)
    _, err = moved.communicate(timeout=120)
    assert moved.returncode == 0, err
    assert (
        len(re.findall(r"^this run was trained by onnxruntime .* so far and goes on by torch ", err, re.M))
        == 1
    )
    assert losses(tmp_path / "moved") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


def test_shared_halves_of_both_runtimes_end_with_the_same_bits(made, tmp_path, capsys):
    clients = {"count": 2, "halves": "shared", "schedule": "synchronous", "grace_s": 60.0}
    config = write_config(tmp_path / "config.yaml", made, clients=clients)
    with Server(made / "halves" / "server", tmp_path / "service") as serving:
        second = enrol(tmp_path / "service", "second", capsys)
        runs = [tmp_path / place / "run" for place in ("a", "b")]
        processes = [
            joining(made / "halves", serving.line, config, runs[0], "--seed", "0"),
            join(made / "halves" / "client", second, config, "--output-dir", runs[1], "--seed", "0"),
        ]
        summaries = [finished(process) for process in processes]
    assert summaries[0]["client_digest"] == summaries[1]["client_digest"]
    assert summaries[0]["journal_updates"] == 6


@pytest.mark.parametrize("name", ["hosl", pytest.param("fo-lora", marks=pytest.mark.slow)])
def test_a_half_given_by_a_device_without_torch_is_merged_on_the_server(
    made, server, tmp_path, capsys, name, request
):
    config, merged = write_config(tmp_path / "config.yaml", made, **RUNS[name]), {}
    halves = request.getfixturevalue("adapted") if "lora" in name else made / "halves"
    for runtime in ("onnx", "torch"):
        run = tmp_path / runtime
        if runtime == "onnx":
            finished(joining(halves, server.line, config, run, "--give-half"))
        else:
            finished(
                join(made / "halves" / "client", server.line, config, "--output-dir", run, "--give-half")
            )
        identity = json.loads((run / "record.json").read_text())["run_id"]
        words = [
            "merge",
            made / "service",
            "--run",
            identity,
            "--base",
            made / "model-in",
            "-o",
            run / "merged",
        ]
        assert main([*map(str, words), "--json"]) == 0
        said = capsys.readouterr().err
        assert "digest" not in said  # the journal has the bits of torch's
        merged[runtime] = safetensors.torch.load_file(run / "merged" / "model.safetensors")
    ours, theirs = merged["onnx"], merged["torch"]
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in ours)
    base = safetensors.torch.load_file(made / "model-in" / "model.safetensors")
    key = next(n for n in ours if n.endswith("layer.1.attention.self.query.weight"))
    assert (ours[key] != base[key]).any()


# ---- what is refused ----


def edited(made, out, change):
    """A copy of the halves whose runtime.json was changed by `change(facts, folder of graphs)`."""
    shutil.copytree(made / "halves", out / "halves")
    graphs = out / "halves" / "client" / "onnx"
    facts = json.loads((graphs / "runtime.json").read_text())
    change(facts, graphs)
    facts["digest"] = content_digest(msgspec.convert(facts, RuntimeFacts))
    (graphs / "runtime.json").write_text(json.dumps(facts))
    return out / "halves"


def of_another_split(facts, graphs):
    facts["client_digest"] = "0" * 64


def cut_short(facts, graphs):
    file = graphs / facts["prelude"]["file"]
    file.write_bytes(file.read_bytes()[:-100])


def cut_short_and_signed(facts, graphs):
    cut_short(facts, graphs)
    sign(facts, graphs)


def unknown_operator(facts, graphs):
    file = graphs / facts["prelude"]["file"]
    model = onnx.load(file)
    model.graph.node[0].op_type = "Gathre"
    onnx.save(model, file)
    sign(facts, graphs)


def sign(facts, graphs):
    name = facts["prelude"]["file"]
    facts["files"][name] = sha256((graphs / name).read_bytes()).hexdigest()


def engine_of_the_future(facts, graphs):
    facts["minimum_onnxruntime"] = "99.1"


def without_graphs(facts, graphs):
    for file in graphs.iterdir():
        file.unlink()


DAMAGE = {
    of_another_split: "graphs and weights are of different splits",
    cut_short: "cut short, or of another split",
    cut_short_and_signed: "cannot be opened by onnxruntime",
    unknown_operator: "cannot be opened by onnxruntime",
    engine_of_the_future: "the graphs need onnxruntime 99.1 or newer",
}


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_graphs_that_cannot_be_used_are_refused_in_one_line(made, server, tmp_path, change):
    config = write_config(tmp_path / "config.yaml", made)
    halves = edited(made, tmp_path, change)
    refused(joining(halves, server.line, config, tmp_path / "run"), DAMAGE[change])
    assert not (tmp_path / "run").exists()


def refused(process, says, status=1):
    """Wait for a process that must refuse in one line."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    assert json.loads(out)["error"]["message"] in err
    (line,) = err.splitlines()
    assert says in line


IMPOSSIBLE = {
    "client.memory_budget: 90MiB": ({"client": {"memory_budget": "90MiB"}}, "client.memory_budget is 90 MiB, but"),
    "method: fo-fo": ({"method": "fo-fo"}, "the onnx runtime has no method: fo-fo"),
    "client.device: cuda:0": ({"client": {"device": "cuda:0"}}, "client.device: cuda:0 is for the torch runtime"),
    "wire.labels: client": ({"wire": {"labels": "client"}}, "was split for labels at the server"),
}  # fmt: skip


@pytest.mark.parametrize("setting", IMPOSSIBLE)
def test_settings_that_the_engine_cannot_meet_are_refused_in_one_line(made, server, tmp_path, setting):
    settings, says = IMPOSSIBLE[setting]
    config = write_config(tmp_path / "config.yaml", made, **settings)
    refused(joining(made / "halves", server.line, config, tmp_path / "run"), says, status=2)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_lost_by_a_graph_that_is_damaged_meanwhile(made, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", made, **RUNS["hosl"])
    whole = finished(joining(made / "halves", server.line, config, tmp_path / "whole"))
    halves = edited(made, tmp_path, lambda facts, graphs: None)
    dying = [HERE / "dying_client.py", "Step", 5, "before"]
    joining(halves, server.line, config, tmp_path / "run", program=dying).communicate(timeout=120)
    graph = halves / "client" / "onnx" / "prelude.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[:-1])
    refused(joining(halves, server.line, config, tmp_path / "run"), "cut short")
    graph.write_bytes(content)
    again = finished(joining(halves, server.line, config, tmp_path / "run"))
    assert again["client_digest"] == whole["client_digest"]


def test_a_half_without_graphs_and_a_device_without_an_engine_say_what_to_do(made, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", made)
    halves = edited(made, tmp_path, without_graphs)
    (halves / "client" / "onnx" / "runtime.json").unlink()
    refused(
        joining(halves, server.line, config, tmp_path / "run"),
        "has no graphs for ONNX Runtime, and PyTorch",
        2,
    )
    bare = [HERE / "without_torch.py", "--and", "onnxruntime"]
    refused(
        joining(made / "halves", server.line, config, tmp_path / "run", program=bare),
        "needs an engine, and none is installed", 2,
    )  # fmt: skip


def test_graphs_of_another_version_of_the_engine_are_used_and_it_is_said(made, server, tmp_path):
    config = write_config(tmp_path / "config.yaml", made, method="frozen", max_steps=2)

    def checked_elsewhere(facts, graphs):
        facts["versions"]["onnxruntime"] = "1.31.9"

    halves = edited(made, tmp_path, checked_elsewhere)
    process = joining(halves, server.line, config, tmp_path / "run")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert len([line for line in err.splitlines() if "were checked with onnxruntime 1.31.9" in line]) == 1
