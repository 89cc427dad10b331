"""`hosl generate` and `hosl predict` across the split on a device without torch: what the torch device says."""

import json

import pytest

from tests.integration.devices import (
    WORDS,
    classifier_halves,
    device,
    joining,
    split_with_graphs,
    write_config,
)
from tests.integration.languages import PROMPTS, language_model, tuning
from tests.integration.network import ENVIRONMENT, HOSL, Server, anew, finished

TOKENS = 8
ASKED = [part for prompt in PROMPTS for part in ("--prompt", prompt)]


def torch_device(*words):
    return anew([*HOSL, *map(str, words)], env=ENVIRONMENT)


@pytest.fixture(
    scope="module",
    params=["server", "client"],
    ids=lambda at: f"labels-at-{at}",
)
def language(request, tmp_path_factory):
    """The folder of a tiny language model that was split with graphs, and where its labels are."""
    folder = tmp_path_factory.mktemp("language")
    model = language_model(folder / "model", "llama")
    split_with_graphs(request.config, model, folder / "halves", "--cut", 2, "--labels-at", request.param)
    return folder, request.param


def said(process):
    return [(row["text"], row["tokens"], row["end"]) for row in finished(process)["answers"]]


@pytest.mark.slow  # a minute for the graphs
def test_a_device_without_torch_says_token_for_token_what_a_torch_device_says(language, tmp_path):
    folder, labels = language
    config = tuning(tmp_path, folder / "model", wire={"labels": labels})
    half = folder / "halves" / "client"
    with Server(folder / "halves" / "server", tmp_path / "service") as server:
        ask = ["--to", server.line, *ASKED, "--max-new-tokens", TOKENS, "--json"]
        base = said(device("generate", half, *ask))
        assert base == said(torch_device("generate", half, *ask))
        finished(joining(folder / "halves", server.line, config, tmp_path / "run", "--model.cut", 2))
        tuned = said(device("generate", tmp_path / "run", *ask))
        assert tuned == said(torch_device("generate", tmp_path / "run", *ask, "--runtime", "torch"))
        before = finished(device("generate", tmp_path / "run", *ask, "--before"))["answers"]
        assert (
            [row["before"] for row in before]
            == [text for text, _, _ in base]
            != [text for text, _, _ in tuned]
        )
        drawn = [*ask, "--temperature", "1.5", "--seed", "3"]
        assert said(device("generate", half, *drawn)) == said(torch_device("generate", half, *drawn))


@pytest.mark.slow
def test_a_device_without_torch_predicts_what_a_torch_device_predicts(tmp_path, pytestconfig):
    classifier_halves(pytestconfig, tmp_path, WORDS)
    config = write_config(tmp_path / "config.yaml", tmp_path, max_steps=4)
    with Server(tmp_path / "halves" / "server", tmp_path / "service") as server:
        finished(joining(tmp_path / "halves", server.line, config, tmp_path / "run"))
        ask = ["predict", tmp_path / "run", tmp_path / "data.csv", "--to", server.line, "--json"]
        here = finished(device(*ask, "-o", tmp_path / "here.jsonl"))
        there = finished(torch_device(*ask, "-o", tmp_path / "there.jsonl", "--runtime", "torch"))
    assert here["accuracy"] == there["accuracy"]
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("here.jsonl", "there.jsonl")
    )
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a["probabilities"] == pytest.approx(b["probabilities"], abs=1e-5)


def test_a_runtime_without_a_server_is_refused(tmp_path):
    process = torch_device("generate", tmp_path, "--prompt", "a", "--runtime", "onnx")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "--runtime is for a half whose other half is on a server" in err
