"""Devices with server adapters of their own in one run: each ends as with a server to itself, whatever is killed."""

import json
import signal

import safetensors.torch
import torch

from hosl.cli import main
from hosl.system.checkpoint import checkpoint_steps
from tests.integration.network import Server, enrol, finished, join, newest, split, wait_until

LORA = {
    "learning_rate": 1e-3, "trainable": "lora", "optimiser": {"name": "adamw"}, "lora": {"r": 4, "alpha": 8},
}  # fmt: skip
SETTINGS = {"method": "fo-fo", "max_steps": 12, "save_steps": 4, "server": LORA}

OF_OWN = (
    "--merge-tokens",
    "0",
    "--adapter-slots",
    "1",
    "--give-half",
)  # merged steps are equal but for rounding


def tensors_of(checkpoints):
    """Every tensor of the server's part of the newest checkpoint, its optimiser's too."""
    folder = newest(checkpoints) / "server"
    return {
        f"{file.stem}/{name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.torch.load_file(file).items()
    }


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_each_of_two_devices_ends_as_with_a_server_to_itself_whatever_is_killed(tiny_run, tmp_path, capsys):
    halves, service, runs = (
        tmp_path / "halves",
        tmp_path / "service",
        [tmp_path / n / "run" for n in ("a", "b")],
    )
    config = tiny_run(**SETTINGS)
    split(tmp_path / "model-in", halves)
    with Server(halves / "server", tmp_path / "single", "--give-half") as server:
        single = finished(
            join(halves / "client", server.line, config, "--output-dir", tmp_path / "single-run")
        )
        merged = ["merge", str(tmp_path / "single-run"), "-o", str(tmp_path / "model"), "--to", server.line]
        assert main(merged) == 0
        assert server.stop() == 0
    (served,) = (tmp_path / "single" / "runs").iterdir()
    alone = tensors_of(served / "checkpoints")
    config = tiny_run(**SETTINGS, clients={"count": 2, "server": "personal"})
    with Server(halves / "server", service, "--merge-tokens", "0") as server:
        lines, address = [server.line, enrol(service, "second", capsys)], server.address
        first = join(halves / "client", lines[0], config, "--output-dir", runs[0])
        wait_until(lambda: 4 in checkpoint_steps(runs[0] / "checkpoints"))
        second = join(halves / "client", lines[1], config, "--output-dir", runs[1])
        wait_until(lambda: (runs[1] / "metrics.jsonl").exists())
        second.kill()  # a device, in its first steps
        second.communicate()
        server.process.send_signal(signal.SIGKILL)  # and the server of the other
        server.process.wait()
    second = join(halves / "client", lines[1], config, "--output-dir", runs[1])
    with Server(halves / "server", service, *OF_OWN, listen=address) as server:
        for process in (first, second):
            assert finished(process)["client_digest"] == single["client_digest"]
        # what each device gets in the end: its own half and its own adapters
        for line, run in zip(lines, runs, strict=True):
            assert main(["merge", str(run), "-o", str(run.parent / "model"), "--to", line]) == 0
            model, due = (folder / "model" / "model.safetensors" for folder in (run.parent, tmp_path))
            assert model.read_bytes() == due.read_bytes()
        assert server.stop() == 0
    for name in ("first", "second"):
        assert_same(tensors_of(service / "runs" / "run" / "clients" / name / "checkpoints"), alone)
    capsys.readouterr()
    assert main(["runs", "ls", "--service", str(service), "--json"]) == 0
    (listed,) = json.loads(capsys.readouterr().out)["runs"]
    saved = {seat["name"]: (seat["step"], seat["saved_steps"]) for seat in listed["seats"]}
    assert saved == {"first": (12, [8, 12]), "second": (12, [8, 12])}
