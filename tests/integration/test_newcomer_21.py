"""What a newcomer's own text and options do: nothing that was asked for is left aside without a word."""

import json

import pytest

from hosl.cli import main
from hosl.tasks.chat_template import ChatTemplate
from tests.integration.languages import language_model, tuning
from tests.integration.network import Server
from tests.texts import CHATS, PAIRS, text_run

OWN = "{% for m in messages %}#{{ m.role }}# {{ m.content }}\n{% endfor %}{{ '#assistant# ' if add_generation_prompt }}"
HELLO = [{"role": "user", "content": "Hello"}]


def generated(capsys, *words):
    """The answers of `hosl generate`, and what was said on standard error."""
    capsys.readouterr()
    assert main(["generate", *map(str, words), "--max-new-tokens", "6", "--json"]) == 0
    out, err = capsys.readouterr()
    return [row["text"] for row in json.loads(out)["answers"]], err


def refused(capsys, *words):
    """What `hosl` says of a request that it refuses, in one line."""
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text]
    return line


@pytest.fixture
def own_template(tmp_path):
    """The path of a config of chats in a template of their own; the model has another."""
    (tmp_path / "own.jinja").write_text(OWN)
    config = text_run(tmp_path, CHATS, max_steps=2, eval_steps=2)
    text = config.read_text().replace("kind: sft", f"kind: sft\n  chat_template: {tmp_path / 'own.jinja'}")
    config.write_text(text)
    return config


def test_a_model_is_asked_and_exported_in_the_chat_template_that_it_was_tuned_with(
    own_template, tmp_path, capsys
):
    run = tmp_path / "run"
    assert main(["train", str(own_template), "--json"]) == 0
    asked = ChatTemplate.load(tmp_path / "model-in", tmp_path / "own.jinja").text(HELLO, answer_follows=True)
    chat, _ = generated(capsys, run, "--chat", "--prompt", "Hello")
    plain, _ = generated(capsys, run, "--prompt", asked)
    others, _ = generated(
        capsys, run, "--prompt", ChatTemplate.load(tmp_path / "model-in").text(HELLO, answer_follows=True)
    )
    assert chat == plain
    assert chat != others, "the two templates must ask for different answers, or this test sees nothing"
    exported, _ = generated(capsys, run / "model", "--chat", "--prompt", "Hello")
    assert exported == chat
    assert (run / "model" / "chat_template.jinja").read_text() == OWN


@pytest.mark.usefixtures("unchecked")
def test_across_the_split_and_in_a_merged_model_the_chat_template_is_that_of_the_run(
    own_template, tmp_path, capsys
):
    halves, joined, out = tmp_path / "halves", tmp_path / "joined", tmp_path / "out"
    assert (
        main(["split", str(tmp_path / "model-in"), str(halves), "--cut", "1", "--config", str(own_template)])
        == 0
    )
    with Server(halves / "server", tmp_path / "service", "--plaintext", "--give-half") as server:
        to = ["--to", server.line, "--plaintext"]
        arguments = [str(halves / "client"), *to, "--config", str(own_template), "--output-dir", str(joined)]
        assert main(["join", *arguments]) == 0
        across, _ = generated(capsys, joined, *to, "--chat", "--prompt", "Hello")
        # another model's tokenizer and templates are not put beside these weights
        other = language_model(tmp_path / "other", "llama")
        said = refused(capsys, "merge", joined, *to, "-o", out, "--base", other)
        assert "give the model that was split" in said
        assert not out.exists()
        assert main(["merge", str(joined), *to, "-o", str(out)]) == 0
    assert (out / "chat_template.jinja").read_text() == OWN
    merged, _ = generated(capsys, out, "--chat", "--prompt", "Hello")
    assert merged == across


def test_a_chat_template_for_rows_that_are_no_chats_is_refused(tmp_path, capsys):
    config = text_run(tmp_path, PAIRS)
    said = refused(capsys, "train", config, "--task.chat-template", tmp_path / "nowhere.jinja")
    assert "task.chat_template is for chats" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a run that is finished, beside its config and its model."""
    folder = tmp_path_factory.mktemp("tuned")
    assert main(["train", str(tuning(folder, language_model(folder / "model", "llama"))), "--json"]) == 0
    return folder


def test_options_that_change_nothing_are_said(tuned, capsys):
    _, err = generated(capsys, tuned / "run", "--prompt", "great", "--top-p", "0.5", "--seed", "3")
    assert "--top-p and --seed change nothing: at temperature 0" in err
    _, err = generated(capsys, tuned / "run", "--prompt", "great", "--top-p", "0.5", "--temperature", "1")
    assert "change nothing" not in err


def test_a_file_of_rows_is_not_taken_for_lines_of_prompts(tuned, tmp_path, capsys):
    for name in ("rows.csv", "rows.json"):
        (tmp_path / name).write_text('[{"prompt": "great"}]\n')
        said = refused(capsys, "generate", tuned / "run", "--prompts", tmp_path / name)
        assert "are not read as prompts; allowed: .jsonl" in said
    (tmp_path / "rows.ndjson").write_text('{"prompt": "great"}\n')
    of_rows, _ = generated(capsys, tuned / "run", "--prompts", tmp_path / "rows.ndjson")
    assert (of_rows, "") == (generated(capsys, tuned / "run", "--prompt", "great")[0], "")


def test_before_of_a_model_is_refused_before_it_speaks(tuned, capsys):
    said = refused(capsys, "generate", tuned / "run" / "model", "--prompt", "great", "--before")
    assert "--before is for the folder of a run" in said
