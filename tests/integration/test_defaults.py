"""The defaults on data of one's own, and the rates that a config which leaves them out gets."""

import csv
import json

import pytest
import yaml

from hosl.cli import main
from hosl.config import Config, load_config, parse_config
from hosl.network.handshake import training_message

CARDS = ("card_arrival", "lost_or_stolen_card", "card_not_working", "card_swallowed")


@pytest.mark.parametrize(
    ("settings", "optimiser", "rate"),
    [
        ({}, "adamw", 1e-4),
        ({"server": {"optimiser": {"name": "sgd"}}}, "sgd", 1e-3),
        ({"server": {"optimiser": {"momentum": 0.9}}}, "sgd", 1e-3),
        ({"server": {"learning_rate": 0.5, "optimiser": {"name": "sgd"}}}, "sgd", 0.5),
        ({"server": {"learning_rate": 0.0}}, "adamw", 0.0),
        ({"method": "zo-zo"}, "adamw", 1e-3),  # trained by probes: plain SGD, whatever the optimiser is
        ({"method": "fo-zo"}, "adamw", 1e-3),
    ],
)
def test_a_server_rate_that_is_left_out_is_the_optimisers_usual_one(settings, optimiser, rate):
    config = parse_config(settings, where="x")
    assert (config.server.optimiser.name, config.server_rate) == (optimiser, rate)
    assert training_message(config).learning_rate == pytest.approx(rate)


def test_a_run_keeps_the_rates_that_it_used(tiny_run, tmp_path):
    assert main(["train", str(tiny_run(server={}, max_steps=1))]) == 0
    kept = load_config(tmp_path / "run" / "config.yaml").server
    assert (kept.learning_rate, kept.optimiser.name) == (1e-4, "adamw")
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["server_learning_rate"] == 1e-4
    assert Config().server.learning_rate is None


@pytest.mark.parametrize(("method", "said"), [("zo-zo", 1), ("hosl", 0)])
def test_a_probed_server_says_that_it_reads_no_optimiser(tiny_run, capsys, method, said):
    assert (
        main(["train", str(tiny_run(method=method, server={"optimiser": {"name": "adamw"}}, max_steps=1))])
        == 0
    )
    line = "the server is probed, too: plain SGD at server.learning_rate 0.001; server.optimiser (adamw) is not read\n"
    assert capsys.readouterr().err.count(line) == said


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_defaults_learn_200_rows_of_four_classes(hosl_data, tmp_path, capsys, seed):
    """Mean-pooled embeddings of the same model under logistic regression reach 98 % here."""
    for part, most in (("train", 50), ("test", None)):
        with (hosl_data / "data" / "banking77" / f"{part}.csv").open(newline="") as file:
            read = list(csv.DictReader(file))
        rows = [row for card in CARDS for row in [r for r in read if r["category"] == card][:most]]
        with (tmp_path / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["text", "label"], *((r["text"], r["category"]) for r in rows)])
    task = {"kind": "files", "train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")}
    config = {"output_dir": str(tmp_path / "run"), "task": task, "seed": seed}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "my.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] >= 0.95
