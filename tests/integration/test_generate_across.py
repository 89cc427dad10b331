"""Generation across the split, over loopback TLS: token for token the merged model's, and nothing is left of it."""

import json
import shutil

import numpy as np
import pytest
import transformers

from hosl.cli import main
from hosl.config import load_config
from hosl.network.torch_runtime import open_text_half
from hosl.system.checkpoint import read_checkpoint
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.integration.languages import PROMPTS, WORDS, greedy_words, language_model, tuning
from tests.integration.network import Server, enrol, finished, join, newest, server_state, wait_until
from tests.integration.recorder import Recorder, messages

TOKENS = 8
ASKED = [part for prompt in PROMPTS for part in ("--prompt", prompt)]


def split_for(folder, model, cut, labels):
    words = ["split", str(model), str(folder / "halves"), "--cut", str(cut), "--labels-at", labels, "--json"]
    assert main(words) == 0
    return folder / "halves"


def generate(capsys, *words):
    """The JSON result of `hosl generate` in this process, and what it said."""
    capsys.readouterr()
    status = main(["generate", *map(str, words), "--max-new-tokens", str(TOKENS), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out), err


def merge_three_pieces(model, halves, joined, service, out):
    """Write the model whose tensors are those of a device's half and head and of a server's trunk."""
    checkpoint = read_checkpoint(newest(joined / "checkpoints"))
    device = open_text_half(load_config(joined / "config.yaml"), halves / "client", checkpoint)
    merged = transformers.AutoModelForCausalLM.from_pretrained(model)
    tensors = device._half.state_dict() | device._head.state_dict() | server_state(service)
    merged.load_state_dict(tensors)
    merged.save_pretrained(out)
    shutil.copy(model / "tokenizer.json", out)
    shutil.copy(model / "tokenizer_config.json", out)


# the cut that a joined run has, the labels' place, and the family
SETUPS = [("llama", "server"), ("opt", "client"), ("gpt2", "server")]


@pytest.mark.parametrize(("family", "labels"), SETUPS, ids=[f"{f}-labels-at-{at}" for f, at in SETUPS])
def test_a_joined_runs_halves_say_across_the_split_what_the_merged_model_says(
    tmp_path, capsys, family, labels
):
    model = language_model(tmp_path / "model", family)
    config = tuning(tmp_path, model, wire={"labels": labels})
    halves = split_for(tmp_path, model, 1, labels)
    with Server(halves / "server", tmp_path / "service") as server:
        assert finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))[
            "finished"
        ]
        across, err = generate(capsys, tmp_path / "joined", "--to", server.line, *ASKED, "--before")
        _, said = generate(capsys, halves / "client", "--to", server.line, *ASKED)
        drawn = [tmp_path / "joined", "--to", server.line, *ASKED, "--temperature", "3"]
        some, every = (generate(capsys, *drawn, *more)[0] for more in (("--top-k", "9"), ("--top-p", "0.9")))
        events = [event for event in server.events if event["event"] == "generate"]
        assert server.stop() == 0
    if labels == "server":  # the same run in one process, whose halves have the same bits
        assert main(["train", str(config), "--json"]) == 0
    else:
        merge_three_pieces(
            model, halves, tmp_path / "joined", tmp_path / "service", tmp_path / "run" / "model"
        )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    before = transformers.AutoModelForCausalLM.from_pretrained(model)
    for row, prompt in zip(across["answers"], PROMPTS, strict=True):
        assert row["text"].split() == greedy_words(merged, prompt, TOKENS)
        assert row["before"].split() == greedy_words(before, prompt, TOKENS)
    assert [row["text"] for row in across["answers"]] != [row["before"] for row in across["answers"]]
    # draws, too, from few candidates as from all, are those of the model in one process
    here = [tmp_path / "run" / "model", *ASKED, "--temperature", "3"]
    assert some["answers"] == generate(capsys, *here, "--top-k", "9")[0]["answers"]
    assert every["answers"] == generate(capsys, *here, "--top-p", "0.9")[0]["answers"]
    assert f"now: this half: {tmp_path / 'joined'} after step 4" in err
    name = json.loads((tmp_path / "joined" / "record.json").read_text())["run_id"]
    assert f"the server's half: run {name} after step 4" in err
    assert "the server's half: as it was split" in err
    unpaired = f"this half is as it was split: if run {name} trained its device's half"
    assert said.count(unpaired) == 1  # of five texts
    assert unpaired not in err
    assert [event["run"] for event in events[:10]] == [name] * 5 + [""] * 5


@pytest.mark.parametrize("halves", ["shared", "personal"])
def test_a_half_that_lacks_updates_of_others_is_said_to_be_no_model_with_the_servers(
    tmp_path, capsys, halves
):
    model = language_model(tmp_path / "model", "llama")
    config = tuning(tmp_path, model, wire={"labels": "server"}, clients={"count": 2, "halves": halves})
    folder = split_for(tmp_path, model, 1, "server")
    with Server(folder / "server", tmp_path / "service") as server:
        second = enrol(tmp_path / "service", "second", capsys)
        said = {}
        for name, line in (
            ("a", server.line),
            ("b", second),
        ):  # one after the other: b has all updates of both
            out = tmp_path / name / "run"
            assert finished(join(folder / "client", line, config, "--output-dir", out))["finished"]
        for name, line in (("a", server.line), ("b", second)):
            _, said[name] = generate(capsys, tmp_path / name / "run", "--to", line, *ASKED)
        assert server.stop() == 0
    unpaired = "this half has 4 of the 8 updates of run run (clients.halves: shared)"
    assert said["a"].count(unpaired) == (halves == "shared")  # of five texts
    assert "never one model" not in said["b"]
    more = "all of whose updates this half has" if halves == "shared" else "of 2 devices"
    assert f"the server's half: run run after step 8, {more}" in said["b"]


def test_a_half_behind_the_servers_is_said_to_be_no_model_with_it(tmp_path, capsys):
    model = language_model(tmp_path / "model", "llama")
    config = tuning(tmp_path, model, wire={"labels": "server"})
    folder = split_for(tmp_path, model, 1, "server")
    with Server(folder / "server", tmp_path / "service") as server:
        joined = tmp_path / "joined"
        assert finished(join(folder / "client", server.line, config, "--output-dir", joined))["finished"]
        shutil.rmtree(newest(joined / "checkpoints"))
        _, said = generate(capsys, joined, "--to", server.line, *ASKED)
        assert server.stop() == 0
    assert (
        said.count("this half is after step 2, the server's after step 4: these two were never one model")
        == 1
    )


def test_a_run_that_goes_on_is_not_disturbed_by_texts_and_each_says_its_step(tmp_path, capsys):
    model = language_model(tmp_path / "model", "llama")
    config = tuning(tmp_path, model, max_steps=60, eval_steps=60, save_steps=30)
    halves = split_for(tmp_path, model, 1, "server")
    with Server(halves / "server", tmp_path / "service") as server:
        process = join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined")
        wait_until(lambda: any(event["event"] == "hello" for event in server.events))
        while process.poll() is None:
            generate(capsys, halves / "client", "--to", server.line, *ASKED)
        assert finished(process)["finished"]
        steps = [event["step"] for event in server.events if event["event"] == "generate"]
        assert server.stop() == 0
    assert any(0 < step < 60 for step in steps)
    assert main(["train", str(config), "--json"]) == 0
    alone, beside = (tmp_path / run / "metrics.jsonl" for run in ("run", "joined"))
    assert beside.read_bytes() == alone.read_bytes()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_text_sends_its_hidden_states_and_no_token(tmp_path, capsys, labels):
    """Every byte of the client, decoded: with the head on the device the server is told of no candidate either."""
    model = language_model(tmp_path / "model", "llama")
    halves = split_for(tmp_path, model, 1, labels)
    with Server(halves / "server", tmp_path / "service", "--plaintext") as server:
        line = JoinLine.parse(server.line)
        recorder = Recorder((line.host, line.port))
        through = f"hosl://127.0.0.1:{recorder.port}#{line.token}"
        said, _ = generate(capsys, halves / "client", "--plaintext", "--to", through, "--prompt", PROMPTS[2])
        recorder.close()
    sent = [pb.GenerateRequest.FromString(m) for stream in recorder.sent for m in messages(stream)]
    first, *others = sent
    ask, prompt = first.ask, PROMPTS[2].split()
    assert (ask.most_tokens, ask.candidates, ask.run) == (len(prompt) + TOKENS, 1, "")
    assert [part.WhichOneof("part") for part in others] == ["hidden", "chunk"] * TOKENS
    shapes = [list(part.hidden.shape) for part in others[::2]]
    assert shapes == [[1, len(prompt), 32], *[[1, 1, 32]] * (TOKENS - 1)]
    assert [len(part.chunk) for part in others[1::2]] == [shape[1] * 32 * 4 for shape in shapes]
    raw = b"".join(map(bytes, recorder.sent))
    for words in (prompt, said["answers"][0]["text"].split()):
        ids = np.array([WORDS.index(word) for word in words])
        for text in (
            *(ids.astype(kind).tobytes() for kind in ("<i4", "<i8", "u1")),
            " ".join(words).encode(),
        ):
            assert text not in raw
