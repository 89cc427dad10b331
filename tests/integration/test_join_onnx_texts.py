"""A device without torch that learns texts and keeps its labels: its head is on ONNX Runtime, too."""

import json
import signal

import pytest
import safetensors.torch

from tests.integration.devices import HERE, joining, losses, split_with_graphs
from tests.integration.network import Server, finished, join, newest
from tests.texts import text_run

RUNS = {
    "hosl": {"method": "hosl", "server": {"learning_rate": 1e-3}},
    "hosl-residual": {"method": "hosl-residual", "client": {"learning_rate": 0.1}},
    "fo-recompute": {"method": "fo-recompute", "client": {"learning_rate": 0.1}},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, pytestconfig):
    """A folder with a tiny language model, rows, and its halves with graphs; labels stay with the client."""
    folder = tmp_path_factory.mktemp("texts")
    text_run(folder)
    words = ["--cut", 1, "--labels-at", "client"]
    split_with_graphs(pytestconfig, folder / "model-in", folder / "halves", *words)
    return folder


@pytest.fixture(scope="module")
def server(made):
    with Server(made / "halves" / "server", made / "service") as serving:
        yield serving


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "hosl-residual" else [pytest.mark.slow]) for name in RUNS]
)
def test_texts_are_learned_as_by_torch(made, server, tmp_path, name):
    config = text_run(tmp_path, **RUNS[name])
    here = finished(joining(made / "halves", server.line, config, tmp_path / "onnx"))
    there = finished(join(made / "halves/client", server.line, config, "--output-dir", tmp_path / "torch"))
    assert here["steps"] == there["steps"] == 6
    ours, theirs = losses(tmp_path / "onnx"), losses(tmp_path / "torch")
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[0] != ours[2] != ours[5]
    for part in ("head", "head-optimiser", "trained"):
        files = [
            newest(tmp_path / run / "checkpoints") / f"client/{part}.safetensors" for run in ("onnx", "torch")
        ]
        if not files[1].exists():
            assert not files[0].exists()
            continue
        a, b = map(safetensors.torch.load_file, files)
        assert {n: (t.shape, t.dtype) for n, t in a.items()} == {n: (t.shape, t.dtype) for n, t in b.items()}
        assert all((a[n] - b[n]).abs().max() <= 1e-4 * b[n].abs().max().clamp(min=1) for n in a)


def test_a_killed_device_ends_where_it_would_have_ended(made, server, tmp_path):
    """The head's own weights and the state of its AdamW are part of the checkpoint."""
    config = text_run(tmp_path, **RUNS["hosl-residual"], server={"learning_rate": 1e-3})
    whole = finished(joining(made / "halves", server.line, config, tmp_path / "whole"))
    dying = [HERE / "dying_client.py", "StepStates", 5, "after"]
    killed = joining(made / "halves", server.line, config, tmp_path / "killed", program=dying)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    again = finished(joining(made / "halves", server.line, config, tmp_path / "killed"))
    assert again["client_digest"] == whole["client_digest"]
    lines = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("killed", "whole")]
    assert lines[0] == lines[1]
    heads = [
        newest(tmp_path / run / "checkpoints") / "client/head.safetensors" for run in ("killed", "whole")
    ]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert json.loads((tmp_path / "killed" / "record.json").read_text())["runtime"]["name"] == "onnx"
