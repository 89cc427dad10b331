"""A virtual environment with nothing but `hosl[edge]`: no torch on its disk. It trains, and survives being killed."""

import json
import random
import signal
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

from tests.integration.devices import (
    ADAPTED_WORDS,
    HERE,
    RUNS,
    classifier_halves,
    losses,
    split_with_graphs,
    write_config,
)
from tests.integration.network import ENVIRONMENT, Server, anew, finished, join
from tests.texts import write_rows
from tests.unit.test_edge_closure import COMMANDS, ENGINE_MIB, JOIN_MIB, WITH_ENGINE, loaded

ROOT = Path(__file__).parents[2]
ALONE = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
"""The environment of a device: it does not see the checkout's sources, nor what else is on a path."""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The folder of the environment's programs."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=True)
    install = [folder / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    ran = subprocess.run([*map(str, install), f"{ROOT}[edge]"], capture_output=True, text=True, env=ALONE)
    assert ran.returncode == 0, ran.stderr
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    there = {path.name for path in site.iterdir()}
    assert {"onnxruntime", "grpc", "hosl"} <= there
    assert there & {"torch", "transformers", "peft", "onnx", "onnxscript"} == set()
    return folder / "bin"


def joining(bare, half, line, config, run, program=()):
    """`hosl join` in the environment; `program`: a program of the tests and its arguments before."""
    start = [bare / "python", *program] if program else [bare / "hosl"]
    command = [*start, "join", half, "--to", line, "--config", config, "--json", "--output-dir", run]
    return anew([str(word) for word in command], env=ALONE, cwd=bare)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, pytestconfig):
    """A folder with data.csv and the halves of a tiny classifier, with all its graphs."""
    return classifier_halves(pytestconfig, tmp_path_factory.mktemp("classifier"), ADAPTED_WORDS)


@pytest.fixture(scope="module")
def server(classifier):
    with Server(classifier / "halves" / "server", classifier / "service") as serving:
        yield serving


@pytest.mark.slow
@pytest.mark.network  # pip takes the packages from its index
def test_no_torch_is_there(bare):
    imported = subprocess.run(
        [bare / "python", "-c", "import torch"], capture_output=True, text=True, env=ALONE
    )
    assert "No module named 'torch'" in imported.stderr


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("name", RUNS)
def test_an_environment_without_torch_trains_as_torch_does(bare, classifier, server, tmp_path, name):
    half = classifier / "halves" / "client"
    config = write_config(tmp_path / "config.yaml", classifier, **RUNS[name])
    summary = finished(joining(bare, half, server.line, config, tmp_path / "onnx"))
    finished(join(half, server.line, config, "--output-dir", tmp_path / "torch"))
    assert summary["finished"]
    ours = losses(tmp_path / "onnx")
    assert len(ours) == 6 + 2 + 1
    assert ours == pytest.approx(losses(tmp_path / "torch"), abs=1e-5)
    record = json.loads((tmp_path / "onnx" / "record.json").read_text())
    assert (record["runtime"]["name"], record["versions"]["torch"]) == ("onnx", "absent")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("modules", "limit_mib"), [(COMMANDS, JOIN_MIB), (WITH_ENGINE, ENGINE_MIB)], ids=["join", "engine"]
)
def test_what_such_a_device_imports_is_small(bare, modules, limit_mib):
    _, peak_mib, _ = loaded(modules, python=bare / "python", env=ALONE)
    print(f"{peak_mib:.1f} MiB")
    assert peak_mib <= limit_mib


CALLS = {
    "hosl": ("Hello", "Losses", "Step", "Save", "Scores"),
    "fo-recompute": ("Hello", "Step", "Save", "Scores"),
}
MODELS = {
    "all-MiniLM-L6-v2": ["--cut", 3, "--head", "classification", "--labels", 20],
    "SmolLM2-135M": ["--cut", 4, "--labels-at", "server"],
}
"""The words of `hosl split`."""
KILLS = 10


@pytest.fixture(scope="module", params=MODELS)
def real(request, tmp_path_factory):
    """The name of an embedded model and the folder of its halves."""
    halves = tmp_path_factory.mktemp("real") / "halves"
    return request.param, split_with_graphs(request.config, request.param, halves, *MODELS[request.param])


def few_rows(name, folder):
    """The section `task` of few short rows for a model."""
    if name == "all-MiniLM-L6-v2":
        return {"kind": "docstrings", "train_rows": 64}
    rows = folder / "rows.jsonl"
    write_rows(rows, [{"prompt": f"{n} and {n} are", "completion": f" {2 * n}."} for n in range(24)])
    return {"kind": "sft", "train": str(rows), "max_tokens": 64}


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("method", CALLS)
def test_ten_kills_at_random_messages_change_nothing(bare, real, tmp_path, method):
    name, halves = real
    config = tmp_path / "config.yaml"
    client = {"learning_rate": 1e-3} | ({} if method == "hosl" else {"trainable": "blocks"})
    settings = {
        "method": method, "task": few_rows(name, tmp_path), "client": client, "wire": {"labels": "server"},
        "zo": {"directions": 2}, "server": {"learning_rate": 1e-3, "optimiser": {"name": "sgd"}},
        "max_steps": 6, "per_device_train_batch_size": 4, "eval_steps": 3, "save_steps": 2, "snapshot_steps": 4,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    chance = random.Random(f"{name} {method}")
    with Server(halves / "server", tmp_path / "service") as server:
        half, line = halves / "client", server.line
        whole = finished(joining(bare, half, line, config, tmp_path / "whole"), wait_s=1200)
        kills = runs = 0
        while kills < KILLS:  # over as many runs as it takes
            runs += 1
            run, done = tmp_path / f"killed-{runs}", None
            while done is None:
                call, when = chance.choice(CALLS[method]), chance.choice(("before", "after"))
                number = 1 if call in ("Hello", "Save") else chance.randint(1, 3)
                program = [HERE / "dying_client.py", call, number, when] if kills < KILLS else ()
                process = joining(bare, half, line, config, run, program=program)
                out, err = process.communicate(timeout=1200)
                assert process.returncode in (0, -signal.SIGKILL), err
                kills += process.returncode != 0
                done = json.loads(out.splitlines()[-1]) if process.returncode == 0 else None
            assert done["client_digest"] == whole["client_digest"]
            assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("method", ["fo-recompute", "hosl-residual"])
def test_sixty_steps_of_docstrings_end_where_torchs_do(bare, pytestconfig, tmp_path, method):
    name = "all-MiniLM-L6-v2"
    halves = split_with_graphs(pytestconfig, name, tmp_path / "halves", *MODELS[name])
    config = tmp_path / "config.yaml"
    settings = {
        "method": method, "task": {"kind": "docstrings", "train_rows": 480},
        "client": {"learning_rate": 1e-2, "trainable": "blocks"}, "residual": {"blocks": 1},
        "server": {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}}, "wire": {"labels": "server"},
        "max_steps": 60, "per_device_train_batch_size": 8, "eval_steps": 30, "save_steps": 60,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))
    with Server(halves / "server", tmp_path / "service") as server:
        half, line = halves / "client", server.line
        finished(joining(bare, half, line, config, tmp_path / "onnx"), wait_s=1200)
        finished(join(half, line, config, "--output-dir", tmp_path / "torch"), wait_s=1200)
    ours, theirs = losses(tmp_path / "onnx"), losses(tmp_path / "torch")
    assert len(ours) == 60 + 2 + 1
    print(f"dev loss {ours[60:]}, on torch {theirs[60:]}")
    assert ours[60:] == pytest.approx(theirs[60:], abs=1e-5)
    assert ours[61] < ours[60]
