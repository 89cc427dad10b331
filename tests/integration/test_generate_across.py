"""Generation across the split, over loopback TLS: token for token the merged model's, and nothing is left of it."""

import json
import shutil

import pytest
import transformers

from hosl.cli import main
from hosl.config import load_config
from hosl.network.torch_runtime import open_text_half
from hosl.system.checkpoint import read_checkpoint
from tests.integration.languages import PROMPTS, greedy_words, language_model, tuning
from tests.integration.network import Server, finished, join, newest, server_state

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
    assert [event["run"] for event in events[:10]] == [name] * 5 + [""] * 5
