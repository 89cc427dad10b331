"""The same run with the server across a network: the same bits."""

import pytest
import safetensors.torch
import torch
from tests.integration.network import Server, finished, join, newest, server_state, split

from hosl.cli import main
from hosl.run.record import read_lines

METHODS = ["hosl", "hosl-gradient", "fo-fo", "zo-zo", "fo-zo", "frozen"]


def client_files(run):
    """The client's part of a run's newest checkpoint."""
    folder = newest(run / "checkpoints") / "client"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_over_loopback_equals_the_run_in_one_process(tiny_run, tmp_path, method):
    config = tiny_run(method=method, client={"learning_rate": 1e-3, "trainable": "all"})
    assert main(["train", str(config), "--json"]) == 0
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        summary = finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
        assert server.stop() == 0
    assert summary["finished"]
    assert (tmp_path / "joined" / "metrics.jsonl").read_bytes() == (
        tmp_path / "run" / "metrics.jsonl"
    ).read_bytes()
    assert client_files(tmp_path / "joined") == client_files(tmp_path / "run")
    here = server_state(tmp_path / "service")

    there = safetensors.torch.load_file(
        newest(tmp_path / "run" / "checkpoints") / "server" / "trained.safetensors"
    )
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    lines = read_lines(tmp_path / "joined" / "timings.jsonl")
    assert all(line["wire_bytes_up"] > 0 for line in lines)
