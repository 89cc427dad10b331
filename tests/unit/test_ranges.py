"""Numbers that a setting cannot mean end in one line, before anything is made."""

import pytest
import yaml

from hosl.cli import main
from hosl.config import load_config, parse_config
from hosl.errors import ConfigError


def _nested(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 10**30),
        ("model.cut", 10**20),
        ("task.max_tokens", 10**20),
        ("task.train_rows", 10**20),
        ("max_steps", 2**31),
        ("per_device_train_batch_size", 10**9),
        ("per_device_eval_batch_size", 10**20),
        ("save_steps", 10**400),
        ("zo.directions", 10**9),
        ("client.micro_batch_size", 10**20),
        ("client.lora.r", 8_000_000),
        ("server.lora.alpha", 10**400),
        ("clients.count", 10**20),
        ("clients.grace_s", float("inf")),
        ("wire.connect_s", 1e300),
        ("client.learning_rate", float("inf")),
        ("server.learning_rate", 1e300),
        ("server.optimiser.weight_decay", float("inf")),
    ],
)
def test_a_number_out_of_range_is_refused_by_one_line(tmp_path, capsys, path, value):
    content = {"output_dir": str(tmp_path / "run")} | _nested(path, value)
    if path.startswith("task"):
        content["task"]["kind"] = "docstrings"
    if "lora" in path:
        content[path.split(".")[0]]["trainable"] = "lora"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"{path.partition('.')[2]} must lie in 1.." in line
        if "lora" in path
        else f"{path} must lie in 0.." in line
    )
    assert len(line) < 400
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [0, 2**63, 2**64 - 1])
def test_every_seed_that_a_message_of_the_wire_can_hold_is_taken(seed):
    assert parse_config({"seed": seed}, where="here").seed == seed


@pytest.mark.parametrize("text", ["seed: " + "9" * 5000, "a: 2026-13-45", "[" * 3000, "a: &a [*a, *b]"])
def test_yaml_that_python_cannot_hold_ends_in_one_line(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(tmp_path / "config.yaml")


def test_more_directions_than_a_device_can_make_in_a_round_are_refused_and_common_ones_are_not():
    rounds = {"halves": "shared", "schedule": "synchronous", "count": 1000}
    content = {"method": "hosl", "clients": rounds, "zo": {"directions": 10}}
    with pytest.raises(
        ConfigError, match=r"are 10000 a round, 4096 are allowed: set clients.directions: common"
    ):
        parse_config(content, where="config")
    parse_config(content | {"clients": rounds | {"directions": "common"}}, where="config")
    parse_config(content | {"clients": rounds | {"count": 400}}, where="config")
