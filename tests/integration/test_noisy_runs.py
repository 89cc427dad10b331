"""Runs whose activations are clipped and blurred before they leave: what they train, and what they say."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from hosl.cli import main
from hosl.config import parse_config
from hosl.errors import ConfigError
from hosl.network.generate import SplitUse, split_model_for_use
from hosl.privacy.accounting import epsilon
from hosl.transport.join_line import JoinLine
from tests.integration.network import Server, finished, join, split


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"wire": {"noise_multiplier": 0.5}}, "in units of wire.clip_norm, which is null"),
        ({"wire": {"clip_norm": 0}}, "wire.clip_norm must be null or a finite number > 0, got 0"),
        ({"wire": {"clip_norm": 1, "noise_multiplier": -1}}, "wire.noise_multiplier must be 0 or"),
        ({"method": "hosl", "wire": {"clip_norm": 1}}, "method hosl sends those of probes, too"),
        ({"method": "zo-zo", "wire": {"clip_norm": 1}}, "method zo-zo sends those of probes, too"),
    ],
)
def test_noise_that_cannot_be_is_refused(tiny_run, capsys, settings, said):
    assert main(["train", str(tiny_run(**settings))]) != 0
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("frozen", marks=pytest.mark.slow),
        "hosl-gradient",
        pytest.param("fo-fo", marks=pytest.mark.slow),
    ],
)
def test_clipping_to_a_norm_that_no_token_has_changes_no_bit_and_noise_changes_the_loss(
    tiny_run, tmp_path, method
):
    metrics = []
    for wire in ({}, {"clip_norm": 1e6}, {"clip_norm": 1e6, "noise_multiplier": 1e-6}):
        config = tiny_run(method=method, wire=wire)
        assert (
            main(["train", str(config), "--json", "--output-dir", str(tmp_path / f"run{len(metrics)}")]) == 0
        )
        metrics.append((tmp_path / f"run{len(metrics)}" / "metrics.jsonl").read_bytes())
    assert metrics[0] == metrics[1] != metrics[2]
    plain, _, noisy = (_client_calls(tmp_path / f"run{number}") for number in range(3))
    assert noisy - plain == {"release", "pull_back"} - ({"pull_back"} if method == "frozen" else set())


def _client_calls(run):
    """What the client's clock has counted in the first step."""
    first = json.loads((run / "timings.jsonl").read_text().splitlines()[0])
    assert sum(first["client_calls_s"].values()) == pytest.approx(first["client_s"], abs=1e-4)
    return set(first["client_calls_s"])


def test_audit_says_the_epsilon_of_a_message_and_of_the_run(tiny_run, tmp_path, capsys):
    config = tiny_run(method="frozen", wire={"clip_norm": 1.0, "noise_multiplier": 20.0})
    split(tmp_path / "model-in", tmp_path / "halves")
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "halves" / "client"), "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "clipped to a norm of 1, with noise of 20 times that on each number" in found["crosses"]
    of_train, of_dev, of_test = found["noise"]
    assert [loss["messages"] for loss in (of_train, of_dev, of_test)] == [2, 4, 1]  # 96 of 77 rows
    assert of_train["of_message"] == pytest.approx(epsilon(20.0 / (2 * math.sqrt(of_train["tokens"])), 1))
    assert of_train["of_run"] > of_train["of_message"]


def test_an_audit_without_the_accountant_has_its_table(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    config = tiny_run(method="frozen", wire={"clip_norm": 1.0, "noise_multiplier": 20.0})
    split(tmp_path / "model-in", tmp_path / "halves")
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "halves" / "client"), "--config", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fields"]
    assert "pip install 'hosl[privacy]'" in found["noise"]


def test_a_first_join_that_was_refused_leaves_no_key(tiny_run, tmp_path, capsys):
    config = tiny_run(method="frozen", max_steps=2, wire={"clip_norm": 1.0})
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        wrong = re.sub("#.{43}", f"#{'a' * 43}", server.line)
        refused = join(halves / "client", wrong, config, "--output-dir", tmp_path / "joined")
        refused.communicate(timeout=240)
        assert refused.returncode
        assert not (tmp_path / "joined").exists()
        assert finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
    assert (tmp_path / "joined" / "noise.key").is_file()


def test_text_is_not_generated_across_the_split_by_a_run_whose_prompts_would_go_up_as_they_are(monkeypatch):
    config = parse_config({"method": "frozen", "wire": {"clip_norm": 1.0}}, where="test")
    monkeypatch.setattr("hosl.network.generate.joined_place", lambda path: (config, path, "run"))
    monkeypatch.setattr("hosl.network.generate.half_facts", lambda *words: {"head": "causal"})
    use = SplitUse(path=Path("run"), line=JoinLine.parse(f"hosl://127.0.0.1:1#{'a' * 43}"))
    with (
        pytest.raises(ConfigError, match="they would go up as they are; let `hosl merge`"),
        split_model_for_use(use, print),
    ):
        pass
