"""`hosl generate` on this machine: what a run's newest weights say, beside what the model said before."""

import html
import io
import json

import pytest
import torch
import transformers

from hosl.cli import main
from tests.integration.languages import PROMPTS, greedy_words, language_model, tuning

TOKENS = 8


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a run that is finished, beside its config and its model."""
    folder = tmp_path_factory.mktemp("tuned")
    config = tuning(folder, language_model(folder / "model", "llama"))
    assert main(["train", str(config), "--json"]) == 0
    return folder


def generate(capsys, *words):
    """The JSON result of `hosl generate`, and what it said."""
    capsys.readouterr()
    assert main(["generate", *map(str, words), "--max-new-tokens", str(TOKENS), "--json"]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


def exported(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_run_says_what_its_exported_model_says_and_what_the_model_said_before(tuned, capsys):
    words = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    result, err = generate(capsys, tuned / "run", *words, "--before")
    now, before = exported(tuned / "run" / "model"), exported(tuned / "model")
    for row, prompt in zip(result["answers"], PROMPTS, strict=True):
        assert row["prompt"] == prompt
        assert row["text"].split() == greedy_words(now, prompt, TOKENS)
        assert row["before"].split() == greedy_words(before, prompt, TOKENS)
        assert (row["tokens"], row["end"]) == (TOKENS, "length")
    assert [row["text"] for row in result["answers"]] != [row["before"] for row in result["answers"]]
    assert f"now: {tuned / 'run'} after step 4" in err
    assert f"before: {tuned / 'model'}" in err


def test_a_config_names_its_newest_run_and_an_exported_model_says_the_same(tuned, capsys):
    (tuned / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1]]) + "\n")
    of_run, _ = generate(capsys, tuned / "config.yaml", "--prompts", tuned / "prompts.txt")
    of_model, _ = generate(capsys, tuned / "run" / "model", "--prompts", tuned / "prompts.txt")
    assert [row["prompt"] for row in of_run["answers"]] == PROMPTS[:2]
    assert of_run["answers"] == of_model["answers"]


def test_the_answer_is_shown_as_it_comes_and_nothing_else_on_standard_output(tuned, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("w1\nw2 w3"))
    assert main(["generate", str(tuned / "run"), "--prompt", "-", "--max-new-tokens", "3"]) == 0
    out, _ = capsys.readouterr()
    said, _ = generate(capsys, tuned / "run", "--prompt", "w1 w2 w3")
    assert out.split() == said["answers"][0]["text"].split()[:3]
    assert out.endswith("\n")


def test_draws_depend_on_the_seed_and_on_nothing_else(tuned, capsys):
    words = [
        tuned / "run",
        "--prompt",
        PROMPTS[0],
        "--prompt",
        PROMPTS[0],
        "--temperature",
        "5",
        "--top-p",
        "0.9",
    ]
    one, _ = generate(capsys, *words)
    assert generate(capsys, *words)[0] == one
    assert generate(capsys, *words, "--seed", "1")[0] != one
    first, second = (row["text"] for row in one["answers"])
    assert first != second


def test_an_answer_ends_before_a_stop_string(tuned, capsys):
    whole, _ = generate(capsys, tuned / "run", "--prompt", PROMPTS[2])
    words = whole["answers"][0]["text"].split()
    stop = words[4]
    cut, _ = generate(capsys, tuned / "run", "--prompt", PROMPTS[2], "--stop", stop)
    assert cut["answers"][0]["end"] == "stop string"
    assert cut["answers"][0]["text"].split() == words[: words.index(stop)]


def test_a_message_is_put_into_the_tokenizers_chat_template(tuned, capsys):
    chat, _ = generate(capsys, tuned / "run", "--chat", "--prompt", "w7 w8")
    plain, _ = generate(capsys, tuned / "run", "--prompt", "<s> w7 w8 It was")
    assert chat["answers"][0]["text"] == plain["answers"][0]["text"]


def test_answers_are_kept_in_the_runs_folder_and_its_page_shows_them_beside_what_was_wanted(
    tuned, tmp_path, capsys
):
    rows = [{"prompt": prompt, "completion": f"<{number}>"} for number, prompt in enumerate(PROMPTS)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result, err = generate(capsys, tuned / "run", "--prompts", tmp_path / "rows.jsonl", "--before", "--keep")
    kept = json.loads((tuned / "run/answers.json").read_text())
    assert kept == result["answers"]
    assert [row["wanted"] for row in kept] == [row["completion"] for row in rows]
    assert "report.html shows them" in err
    page = (tuned / "run/report.html").read_text()
    for row in kept:
        assert all(html.escape(row[name]) in page for name in ("prompt", "text", "before", "wanted"))
    (tuned / "run/answers.json").write_text('[{"prompt": "w1"}]')
    assert main(["report", str(tuned / "run")]) == 2
    assert "answers.json is damaged: Object missing required field `text`" in capsys.readouterr().err
    (tuned / "run/answers.json").unlink()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1"}\n\n{"prompt": 1}\n')
    assert main(["generate", str(tuned / "run"), "--prompts", str(tmp_path / "rows.jsonl")]) == 2
    assert "rows.jsonl, row 3: Expected `str`, got `int` - at `$.prompt`" in capsys.readouterr().err
    assert main(["generate", str(tuned / "model"), "--prompt", "w1", "--keep"]) == 2
    assert "--keep is for the folder of a run" in capsys.readouterr().err


def test_what_cannot_be_answered_is_refused_in_one_line(tuned, tmp_path, capsys):
    def refusal(*words, status=2):
        capsys.readouterr()
        assert main(["generate", *map(str, words)]) == status
        return capsys.readouterr().err.splitlines()[-1]

    run = tuned / "run"
    assert "there is no prompt" in refusal(run)
    assert "the prompt has 70 tokens, the model reads 64" in refusal(run, "--prompt", "w1 " * 70)
    assert "has no token" in refusal(run, "--prompt", "  ")
    assert "temperature must be 0" in refusal(run, "--prompt", "w1", "--temperature", "-1")
    assert "at least 1 token" in refusal(run, "--prompt", "w1", "--max-new-tokens", "0")
    assert "--before is for the folder of a run" in refusal(tuned / "model", "--prompt", "w1", "--before")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "cannot be read" in refusal(run, "--prompts", tmp_path / "latin")
    facts = {"format": 1, "side": "client", "family": "bert", "head": "classification", "cut": 1}
    digests = dict.fromkeys(("base_digest", "digest", "client_digest", "server_digest"), "")
    (tmp_path / "half.json").write_text(json.dumps(facts | digests))
    assert "--to 'hosl://...'" in refusal(tmp_path, "--prompt", "w1")
    assert "--run names a run on a server" in refusal(run, "--prompt", "w1", "--run", "x")
    line = ["--to", f"hosl://a:1#{'t' * 43}.{'f' * 43}", "--prompt", "w1"]
    assert "half of a classifier" in refusal(tmp_path, *line)
    assert "leave --to out" in refusal(run, *line)
    assert "--best is for a run whose both halves are here" in refusal(run, *line, "--best")
    assert "ttt" not in refusal(run, "--prompt", "w1", "--to", f"hosl://a:1#{'t' * 40}")
    assert "no such folder" in refusal(tmp_path / "nowhere", "--prompt", "w1", status=1)


def test_an_answer_has_no_more_tokens_than_the_model_reads(tuned, capsys):
    prompt = "w1 " * 60
    result, err = generate(capsys, tuned / "run", "--prompt", prompt)
    assert result["answers"][0]["tokens"] == 4
    assert "the model reads 64 tokens, the prompt has 60: the answer has at most 4" in err
    assert result["answers"][0]["text"].split() == greedy_words(exported(tuned / "run" / "model"), prompt, 4)
    assert torch.is_grad_enabled()
