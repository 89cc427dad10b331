"""A run that is killed and resumed ends with the bytes of one that was not."""

import random
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from hosl.cli import main
from hosl.training.local_session import load_run
from hosl.training.loop import carry_on
from tests.integration.forked import Forked
from tests.integration.network import ENVIRONMENT, HOSL, newest

_EXACT = ("metrics.jsonl", "model/model.safetensors")


def _train(*words):
    return Forked([*HOSL, "train", *words], env=ENVIRONMENT)


def _finished(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def _exact_bytes(run):
    """Everything a run leaves that is a function of its config alone, digests of its checkpoint included."""
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    names = [*_EXACT, *(str(p.relative_to(run)) for p in checkpoint.rglob("*") if p.is_file())]
    return {name: (run / name).read_bytes() for name in names}


def _kill_and_resume(config, folder, delays):
    """Kill a run so many seconds after its folder appears, again and again, then let it finish."""
    process = _train(config, "--output-dir", folder)
    for delay in delays:
        while process.poll() is None and not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        process = _train("--resume", folder)
    _finished(process)


@pytest.mark.parametrize(
    ("method", "zo", "delay"),
    [
        ("hosl", {}, 0.6),
        pytest.param("hosl-gradient", {"clip": 1.0, "row_clip": 2.0}, 0.8, marks=pytest.mark.slow),
        ("hosl-residual", {}, 0.8),
        pytest.param("hosl-node", {}, 0.8, marks=pytest.mark.slow),
        ("fo-fo", {}, 1.0),
        pytest.param("fo-recompute", {}, 1.0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_bits(tiny_run, tmp_path, method, zo, delay):
    trainable = "blocks" if method in ("hosl-residual", "hosl-node") else "all"
    client = {"learning_rate": 1e-3, "trainable": trainable}
    config = tiny_run(method=method, max_steps=60, client=client, zo=zo)
    _finished(_train(config, "--output-dir", tmp_path / "whole"))
    _kill_and_resume(config, tmp_path / "killed", [delay])
    assert _exact_bytes(tmp_path / "killed") == _exact_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "client",
    [
        {"optimiser": {"name": "adamw"}, "learning_rate": 1e-3},
        {"optimiser": {"momentum": 0.9}, "learning_rate": 1e-3},
        {"trainable": "lora", "learning_rate": 1e-2},
        {"trainable": "lora", "optimiser": {"name": "adamw"}, "learning_rate": 1e-3},
    ],
    ids=["adamw", "momentum", "lora", "lora-adamw"],
)
@pytest.mark.parametrize("method", ["hosl-residual", "fo-recompute"])
def test_a_client_goes_on_with_what_it_has_beside_weights(tiny_run, tmp_path, method, client):
    """Stopped at half, with a state of the optimiser or adapters: the bits of the whole run."""
    config = tiny_run(method=method, max_steps=8, save_steps=4, client=client)
    assert main(["train", str(config), "--output-dir", str(tmp_path / "whole")]) == 0
    assert main(["train", str(config), "--output-dir", str(tmp_path / "half"), "--max-steps", "4"]) == 0
    assert main(["train", "--resume", str(tmp_path / "half"), "--max-steps", "8"]) == 0
    whole, half = (
        load_file(newest(tmp_path / name / "checkpoints") / "client" / "trained.safetensors")
        for name in ("whole", "half")
    )
    assert whole.keys() == half.keys()
    assert all(np.array_equal(whole[name], half[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["hosl", "hosl-gradient", "hosl-residual", "hosl-node", "fo-fo", "fo-recompute", "zo-zo", "frozen"],
)
def test_a_run_killed_four_times_resumes_to_the_same_bits(tiny_run, tmp_path, method):
    """Four kills for each of eight methods, at moments drawn over the whole life of the process."""
    config = tiny_run(method=method, max_steps=80, server={"learning_rate": 1e-2, "optimiser": {"name": "adamw"}}
                      if method not in ("zo-zo",) else {"learning_rate": 1e-3})  # fmt: skip
    _finished(_train(config, "--output-dir", tmp_path / "whole"))
    moments = random.Random(method)
    _kill_and_resume(config, tmp_path / "killed", [moments.uniform(0, 5) for _ in range(4)])
    assert _exact_bytes(tmp_path / "killed") == _exact_bytes(tmp_path / "whole")


def test_ctrl_c_ends_with_a_usable_checkpoint(tiny_run, tmp_path):
    config = tiny_run(max_steps=2000)
    process = _train(config)
    while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: hosl train --resume" in err
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0


def test_a_folder_in_use_is_refused(tiny_run, tmp_path, capsys):
    from hosl.system.run_folder import RunLock

    assert main(["train", str(tiny_run())]) == 0
    with RunLock(tmp_path / "run"):
        assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert "is in use by another process" in capsys.readouterr().err


def test_a_second_run_takes_a_folder_of_its_own(tiny_run, tmp_path):
    config = str(tiny_run(max_steps=2))
    assert main(["train", config]) == main(["train", config]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        tmp_path / "run-2" / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(("changed", "what"), [("data.csv", "task"), ("model-in/model.safetensors", "model")])
def test_a_resume_with_other_inputs_is_refused(tiny_run, tmp_path, capsys, changed, what):
    assert main(["train", str(tiny_run(max_steps=4))]) == 0
    file = tmp_path / changed
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    assert main(["train", "--resume", str(tmp_path / "run")]) == 1
    assert f"was trained with another {what}" in capsys.readouterr().err


def test_a_finished_session_without_a_dev_line_at_its_last_step_gets_one(tiny_run, tmp_path):
    """So it is with a client of several whom the others carry over the last steps."""
    config, run = tiny_run(max_steps=6, eval_steps=6), tmp_path / "run"
    _finished(_train(config, "--output-dir", run))
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    before_dev = sum(len(line) for line in lines if b'"split"' not in line)
    assert b"".join(lines)[:before_dev].count(b'"split"') == 0  # the one dev line is the last step's
    again = carry_on(load_run(run), run, "", lambda session, folder: None, metrics_bytes=before_dev)
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines)
    assert again["dev_accuracy"] >= 0
