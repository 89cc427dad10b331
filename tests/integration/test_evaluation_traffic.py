"""The traffic of evaluations is counted apart: a step's bytes are a step's, in process, over loopback and planned."""

import json

import pytest

from hosl.cli import main
from hosl.system.run_folder import read_lines
from tests.integration.network import Server, finished, join, split

ROWS, SEQ, WIDTH, CLASSES, DIRECTIONS = 8, 2, 32, 2, 2  # two words and no special tokens
TARGETS = SEQ + 8
"""Bytes of a row's mask and class."""


def files(run):
    """The lines of a run's metrics and timings, each as those of steps and those of evaluations."""
    lines = [read_lines(run / name) for name in ("metrics.jsonl", "timings.jsonl")]
    return [[line for line in of if ("split" in line) == split] for of in lines for split in (False, True)]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("labels", [pytest.param("server", marks=pytest.mark.slow), "client"])
def test_a_step_after_an_evaluation_has_the_bytes_of_a_step(tiny_run, tmp_path, capsys, labels):
    config = tiny_run(max_steps=4, eval_steps=2, save_steps=2, wire={"labels": labels})
    halves = split(tmp_path / "model-in", tmp_path / "halves", **{"labels-at": labels})
    with Server(halves / "server", tmp_path / "service") as server:
        summary = finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
    steps, evaluations, timed, timed_evaluations = files(tmp_path / "joined")
    (up,), (down,) = ({step[f"bytes_{way}"] for step in steps} for way in ("up", "down"))
    for way, payload in (("up", up), ("down", down)):
        on_the_wire = [line[f"wire_bytes_{way}"] for line in timed]
        assert max(on_the_wire) - min(on_the_wire) < 64  # the digits of a step, of a time
        assert abs(min(on_the_wire) - payload) < 512  # headers of messages, classes as varints
    assert [line["split"] for line in evaluations] == ["dev", "dev", "test"]
    assert [line["split"] for line in timed_evaluations] == ["dev", "dev", "test"]
    assert [line["step"] for line in timed_evaluations] == [2, 4, 4]
    for line, timing in zip(evaluations, timed_evaluations, strict=True):
        assert min(timing["wire_bytes_up"], line["eval_bytes_up"]) > line["examples"] * SEQ * WIDTH * 4
        assert min(timing["wire_bytes_down"], line["eval_bytes_down"]) >= line["examples"] * CLASSES * 4
        assert timing["wire_s"] > 0
    assert summary["bytes_up_per_step"] == up
    for way in ("up", "down"):
        assert summary[f"eval_bytes_{way}"] == sum(line[f"eval_bytes_{way}"] for line in evaluations)
    if (
        labels == "client"
    ):  # states down and their gradient up, where else classes go up; the one position is 0
        states = ROWS * WIDTH * 4
        asked = (DIRECTIONS + 1) * (ROWS * SEQ + 8)
        assert up == (2 * DIRECTIONS + 1) * ROWS * SEQ * WIDTH * 4 + asked + states
        assert down == (2 * DIRECTIONS + 1) * states
    else:
        assert up == (2 * DIRECTIONS + 1) * ROWS * SEQ * WIDTH * 4 + (DIRECTIONS + 1) * ROWS * TARGETS
    for line in evaluations if labels == "server" else ():
        assert line["eval_bytes_up"] == line["examples"] * (SEQ * WIDTH * 4 + TARGETS)
        assert line["eval_bytes_down"] == line["examples"] * CLASSES * 4
    assert main(["train", str(config), "--json"]) == 0
    here, there = ((tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "joined"))
    assert here == there
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "page.html")]) == 0
    assert "up in all evaluations" in (tmp_path / "page.html").read_text()
    capsys.readouterr()
    assert main(["plan", str(config), "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    (planned,) = [way for way in ways if (way["way"], way["cut"]) == ("hosl", 2)]
    assert planned["bytes_up"] == pytest.approx(up, rel=0.02)
    assert planned["bytes_down"] == pytest.approx(down, rel=0.02)
