"""Own text, instructions and chats from the command line: one process, resumed, across a network, and what is said."""

import json
import re

import pytest
import safetensors.torch
import torch

from hosl.cli import main
from hosl.system.run_folder import read_lines
from hosl.training.local_session import LocalSession
from tests.integration.network import Server, finished, join, newest, server_state
from tests.texts import CHATS, PAIRS, TEXTS, text_run, write_rows


def exact_bytes(run):
    """All that is a function of the config: metrics, model, checkpoint."""
    files = [
        run / "metrics.jsonl",
        run / "model" / "model.safetensors",
        *newest(run / "checkpoints").rglob("*"),
    ]
    return {path.relative_to(run): path.read_bytes() for path in files if path.is_file()}


def test_a_run_of_texts_says_loss_perplexity_and_tokens_right(tmp_path, capsys):
    config = text_run(tmp_path, PAIRS, method="hosl-gradient", save_best=True)
    assert main(["train", str(config), "--json"]) == 0
    said = capsys.readouterr()
    summary = json.loads(said.out.splitlines()[-1])
    assert {"dev_loss_nats", "dev_perplexity", "test_perplexity", "test_accuracy"} <= summary.keys()
    assert not any("f1" in key for key in summary)
    assert "loss_on: completion: " in said.err
    assert "of tokens right (dev loss " in said.err
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    assert "tokens right, %" in page
    assert "test loss, 2 rows; perplexity " in page
    assert "macro F1" not in page
    assert "confusion" not in page
    kept = json.loads((run / "evaluation.json").read_text())
    assert kept["perplexity"] == summary["test_perplexity"]
    assert kept["labels"] == []
    assert "confusion" not in kept
    dev = [line for line in read_lines(run / "metrics.jsonl") if line.get("split") == "dev"]
    lowest = min(dev, key=lambda line: line["loss_nats"])
    assert [path.name for path in (run / "best").iterdir()] == [f"step-{lowest['step']:08d}"]
    assert main(["eval", str(run), "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert {key: evaluated[key] for key in ("loss_nats", "accuracy", "perplexity", "tokens")} == {
        key: dev[-1][key] for key in ("loss_nats", "accuracy", "perplexity", "tokens")
    }
    assert "classes" not in evaluated
    frozen = ["train", str(config), "--method", "frozen", "--output-dir", str(tmp_path / "frozen")]
    assert main([*frozen, "--json"]) == 0
    assert main(["report", str(run), str(tmp_path / "frozen"), "-o", str(tmp_path / "both.html")]) == 0
    both = (tmp_path / "both.html").read_text()
    assert "test tokens right, %" in both
    assert "lowest mean test loss: " in both
    assert "accuracy" not in both.lower()  # in no heading, column or picture of a comparison either
    headings = re.findall(r"<h2>(.*?)</h2>", both)
    assert {"Tokens right against client memory", "Loss and tokens right"} <= set(headings)
    pictures = re.findall(r'<svg[^>]*aria-label="([^"]*)"', both)
    assert "Test tokens right against client memory" in pictures
    assert "Training loss, dev loss and dev tokens right over steps" in pictures


def test_a_run_of_chats_that_stops_goes_on_to_the_same_bits(tmp_path, power_failure):
    config = text_run(tmp_path, CHATS)
    assert main(["train", str(config)]) == 0
    with power_failure(LocalSession, 4):
        assert main(["train", str(config), "--output-dir", str(tmp_path / "stopped")]) == 1
    assert main(["train", "--resume", str(tmp_path / "stopped")]) == 0
    assert exact_bytes(tmp_path / "stopped") == exact_bytes(tmp_path / "run")


@pytest.mark.usefixtures("unchecked")
def test_chats_over_loopback_are_learned_as_in_one_process(tmp_path):
    config = text_run(tmp_path, CHATS, method="hosl-gradient")
    assert main(["train", str(config), "--json"]) == 0
    halves = tmp_path / "halves"
    words = ["split", str(tmp_path / "model-in"), str(halves), "--cut", "1", "--head", "causal", "--json"]
    assert main(words) == 0
    with Server(halves / "server", tmp_path / "service") as server:
        summary = finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
        assert server.stop() == 0
    assert summary["finished"]
    run, joined = tmp_path / "run", tmp_path / "joined"
    assert (joined / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    there = safetensors.torch.load_file(newest(run / "checkpoints") / "server" / "trained.safetensors")
    here = server_state(tmp_path / "service")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize(
    ("rows", "task", "fault"),
    [
        (
            CHATS,
            {"loss_on": "completion"},
            "rows.jsonl: task.loss_on: completion means nothing for such a row",
        ),
        (
            [*CHATS[:4], {"messages": CHATS[0]["messages"][:1]}],
            {},
            "row 5: `messages` has no turn of the assistant",
        ),
        (PAIRS, {"max_tokens": 8}, "tokens, max_tokens is 8: there is no room for an answer"),
        (
            TEXTS,
            {"chat_template": "none.jinja", "loss_on": "assistant"},
            "rows.jsonl: task.loss_on: assistant means",
        ),
        (CHATS, {"chat_template": "none.jinja"}, "chat template none.jinja cannot be read"),
    ],
)
def test_rows_that_cannot_be_learned_end_a_run_in_one_line_before_it_begins(
    tmp_path, capsys, rows, task, fault
):
    config = text_run(tmp_path, rows)
    settings = {"kind": "sft", "train": write_rows(tmp_path / "rows.jsonl", rows)} | task
    words = [
        word for key, value in settings.items() if key != "kind" for word in (f"--task.{key}", str(value))
    ]
    assert main(["train", str(config), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert fault in line
    assert not (tmp_path / "run").exists()
