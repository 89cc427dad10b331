"""The same run with the server across a network: the same bits."""

import pytest
import safetensors.torch
import torch

from hosl.cli import main
from hosl.core.methods import METHODS
from hosl.split import load_half, load_model, split_folder
from hosl.system.run_folder import read_lines
from tests.integration.network import Server, finished, join, newest, server_state, split


def client_files(run):
    """The client's part of a run's newest checkpoint."""
    folder = newest(run / "checkpoints") / "client"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("method", "zo"),
    [
        *((m, {}) for m in METHODS),
        ("hosl", {"server_gradient_at": "first-plus"}),
        ("hosl", {"distribution": "low-rank"}),
        ("zo-zo", {"distribution": "sphere"}),
    ],
)
def test_a_run_over_loopback_equals_the_run_in_one_process(tiny_run, tmp_path, method, zo):
    trainable = "blocks" if method in ("hosl-residual", "hosl-node") else "all"
    config = tiny_run(method=method, zo=zo, client={"learning_rate": 1e-3, "trainable": trainable})
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


@pytest.mark.parametrize(
    ("compression", "share", "method"),
    [
        pytest.param("bf16", 1 / 2, "hosl", marks=pytest.mark.slow),
        ("bf16", 1 / 2, "hosl-gradient"),
        ("int8", 1 / 4 + 1 / 32, "hosl"),
        pytest.param("int8", 1 / 4 + 1 / 32, "hosl-gradient", marks=pytest.mark.slow),
    ],
)
def test_compression_saves_its_share_and_its_error_is_noted(tiny_run, tmp_path, method, compression, share):
    config = tiny_run(
        method=method, max_steps=26, wire={"compression": compression}, zo={"directions": 2, "epsilon": 1e-2}
    )
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        assert finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))[
            "finished"
        ]
    lines = [line for line in read_lines(tmp_path / "joined" / "metrics.jsonl") if "split" not in line]
    noted = [line for line in lines if any(name.startswith("compression_error") for name in line)]
    assert [line["step"] for line in noted] == [1, 26]
    signal, error = ("gradient_norm", "compression_error_norm") if method == "hosl-gradient" else (
        "loss_difference_nats", "compression_error_nats"
    )  # fmt: skip
    assert all(line[signal] and line[error] for line in noted)
    if method == "hosl-gradient":
        assert all(line[error] < 0.05 * line[signal] for line in noted)
    rows, seq, width = 8, 2, 32  # two words and no special tokens
    uploads = 1 if method == "hosl-gradient" else 2 * 2 + 1
    targets_bytes = uploads * (rows * seq + rows * 8)
    if method == "hosl":
        targets_bytes -= 2 * (rows * seq + rows * 8)  # both probes of a direction share theirs
    assert lines[2]["bytes_up"] - targets_bytes == pytest.approx(uploads * rows * seq * width * 4 * share)
    assert (
        main(["train", str(config), "--json"]) == 0
    )  # in one process: the same losses, errors, bytes, evaluations
    in_one = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert in_one == (tmp_path / "joined" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("method", ["fo-fo", "hosl-gradient"])
def test_noise_on_activations_over_loopback_is_that_of_one_process_by_the_same_key(
    tiny_run, tmp_path, monkeypatch, method
):
    """A run over a network draws its key; the run in one process is given it here."""
    config = tiny_run(method=method, max_steps=4, wire={"clip_norm": 2.0, "noise_multiplier": 0.01})
    halves, runs = (
        split(tmp_path / "model-in", tmp_path / "halves"),
        [tmp_path / "joined", tmp_path / "again"],
    )
    with Server(halves / "server", tmp_path / "service") as server:
        for run in runs:
            assert finished(join(halves / "client", server.line, config, "--output-dir", run))["finished"]
        assert server.stop() == 0
    keys = [(run / "noise.key").read_bytes() for run in runs]
    monkeypatch.setattr("hosl.training.local_session.simulated_key", lambda seed: keys[0])
    assert main(["train", str(config), "--json"]) == 0
    joined, again, here = ((run / "metrics.jsonl").read_bytes() for run in [*runs, tmp_path / "run"])
    assert keys[0] != keys[1]
    assert here == joined != again
    assert client_files(tmp_path / "run") == client_files(runs[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_from_a_split_folder_compute_as_the_model_in_one_process(
    tiny, tmp_path, padded, family, dtype
):
    """Converted halves keep float32 buffers, as a model loaded in that dtype does; else rotary families drift apart."""
    tiny(family).save_pretrained(tmp_path / "model")
    split_folder(tmp_path / "model", 1, tmp_path / "halves")
    kind = getattr(torch, dtype)
    whole = load_model(str(tmp_path / "model"), head="causal", num_labels=None, seed=0, dtype=kind).model
    client, server = (load_half(tmp_path / "halves" / side).convert(kind) for side in ("client", "server"))
    ids, mask = padded("left")
    with torch.no_grad():
        expected = whole(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(server(client(ids, mask), mask), expected)
