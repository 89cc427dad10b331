"""Devices with server adapters of their own in one run: each ends as with a server to itself, whatever is killed."""

import signal

import pytest
import safetensors.torch
import torch

from hosl.cli import main
from hosl.system.checkpoint import checkpoint_steps
from tests.integration.network import Server, enrol, finished, join, newest, split, wait_until

PERSONAL = {"count": 2, "server": "personal"}
LORA = {
    "learning_rate": 1e-3, "trainable": "lora", "optimiser": {"name": "adamw"}, "lora": {"r": 4, "alpha": 8},
}  # fmt: skip
SETTINGS = {"method": "fo-fo", "max_steps": 12, "save_steps": 4, "server": LORA}


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


@pytest.fixture
def alone(tiny_run, tmp_path):
    """`alone(seed)`: the digest of a device that has a server to itself, and that server's tensors."""
    ends = {}

    def end():
        if not ends:
            config = tiny_run(**SETTINGS)
            halves = split(tmp_path / "model-in", tmp_path / "halves")
            with Server(halves / "server", tmp_path / "single") as server:
                process = join(
                    halves / "client", server.line, config, "--output-dir", tmp_path / "single-run"
                )
                ends["summary"] = finished(process)
                assert server.stop() == 0
            (run,) = (tmp_path / "single" / "runs").iterdir()
            ends["tensors"] = tensors_of(run / "checkpoints")
        return ends["summary"], ends["tensors"]

    return end


def test_each_of_two_devices_ends_with_the_bits_of_a_server_of_its_own(alone, tiny_run, tmp_path, capsys):
    summary, tensors = alone()
    config = tiny_run(**SETTINGS, clients=PERSONAL)
    halves, service = tmp_path / "halves", tmp_path / "service"
    runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
    with Server(halves / "server", service, "--adapter-slots", "1", "--give-half") as server:
        lines = [server.line, enrol(service, "second", capsys)]
        joined = [
            join(halves / "client", line, config, "--output-dir", run)
            for line, run in zip(lines, runs, strict=True)
        ]
        for process in joined:
            assert finished(process)["client_digest"] == summary["client_digest"]
        for line, run in zip(lines, runs, strict=True):  # what each device gets: its half, its own adapters
            assert main(["merge", str(run), "-o", str(run.parent / "model"), "--to", line, "--json"]) == 0
        assert server.stop() == 0
    for name in ("first", "second"):
        assert_same(tensors_of(service / "runs" / "run" / "clients" / name / "checkpoints"), tensors)
    capsys.readouterr()
    assert main(["runs", "ls", "--service", str(service), "--json"]) == 0
    assert '"saved_steps": {"first": [8, 12], "second": [8, 12]}' in capsys.readouterr().out


def test_a_server_that_is_killed_and_a_device_that_is_leave_no_trace(alone, tiny_run, tmp_path, capsys):
    summary, tensors = alone()
    config = tiny_run(**SETTINGS, clients=PERSONAL)
    halves, service = tmp_path / "halves", tmp_path / "service"
    runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
    with Server(halves / "server", service) as server:
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
    with Server(halves / "server", service, listen=address) as server:
        for process in (first, second):
            assert finished(process)["client_digest"] == summary["client_digest"]
        assert server.stop() == 0
    for name in ("first", "second"):
        assert_same(tensors_of(service / "runs" / "run" / "clients" / name / "checkpoints"), tensors)
