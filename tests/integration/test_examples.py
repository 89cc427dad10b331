"""The files in examples/ that are programs: they run, and they say what their first lines promise."""

import json
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import hosl
from hosl.cli import main
from hosl.config import load_config
from tests.integration.network import ENVIRONMENT

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY_RUN = [
    "--max-steps", "2", "--eval-steps", "2", "--zo.directions", "1", "--per-device-train-batch-size", "2",
    "--task.train-rows", "8", "--task.max-tokens", "8",
]  # fmt: skip


def run(*command, **environment):
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, timeout=240, env=ENVIRONMENT | environment,
    )  # fmt: skip


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_config_of_its_own_folder(example):
    assert load_config(example).output_dir.startswith("runs/")


def test_the_first_run_goes_on_any_language_model_and_its_loss_falls(hosl_data, tmp_path, unchecked):
    small = [
        "--model.name", str(hosl_data / "models" / "stories260K-hf"), "--model.cut", "2", "--task.train-rows", "64",
        "--server.learning-rate", "0.003", "--max-steps", "4", "--eval-steps", "2", "--save-steps", "4",
        "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    assert main(["train", str(EXAMPLES / "smollm2.yaml"), *small]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    dev = [line["loss_nats"] for line in lines if line.get("split") == "dev"]
    assert dev[-1] < dev[0]
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_loop_prints_three_rows_that_start_alike():
    said = run(sys.executable, EXAMPLES / "own_loop.py", "--steps", "3")
    assert said.returncode == 0, said.stderr
    rows = re.findall(r"^(\S+) +([\d.]+) -> ([\d.]+)$", said.stdout, flags=re.MULTILINE)
    assert [name for name, _, _ in rows] == ["frozen", "hosl", "first-order"]
    assert len({before for _, before, _ in rows}) == 1
    assert all(before != after for _, before, after in rows)
    assert "gap closure of hosl" in said.stdout


def test_the_loop_uses_public_names_only():
    text = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")
    assert not re.search(r"(from|import) hosl\.", text)
    assert set(re.findall(r"\bhosl\.(\w+)", text)) <= set(hosl.__all__)


@pytest.fixture
def command(tmp_path):
    """A `hosl` for the script: this Python's, not the one that happens to be on the path."""
    path = tmp_path / "hosl"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m hosl "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_two_machines_train_and_leave_no_server(command, tmp_path):
    work = tmp_path / "work"
    said = run(EXAMPLES / "two_machines.sh", *TINY_RUN, HOSL=command, WORK=str(work))
    assert said.returncode == 0, said.stderr
    assert "finished: True" in said.stdout
    assert (work / "run" / "report.html").is_file()
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(work / "model")
    assert len(merged.config.id2label) == 20
    secret = (work / "line").read_text().strip()
    assert secret.startswith("hosl://")
    assert secret not in said.stdout + said.stderr
    host, port = json.loads((work / "service" / "address.json").read_text())["address"].split(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)

    again = run(EXAMPLES / "two_machines.sh", HOSL=command, WORK=str(work))
    assert again.returncode == 2
    assert "set WORK to a new folder" in again.stderr


def test_two_machines_refuse_a_device_without_its_line(command, tmp_path):
    said = run(EXAMPLES / "two_machines.sh", HOSL=command, WORK=str(tmp_path / "work"), PART="device")
    assert said.returncode != 0
    assert "join line" in said.stderr
