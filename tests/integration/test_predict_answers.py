"""`hosl predict` of a model that learned texts: the answers of `hosl generate`, a line a row, here and across."""

import json

import pytest

from hosl.cli import main
from hosl.inference.text_model import TextModel
from tests.integration.languages import PROMPTS, language_model, tuning
from tests.integration.network import Server, finished, join

CHOICE = ["--max-new-tokens", "6"]
DRAWN = [*CHOICE, "--temperature", "2", "--top-p", "0.9", "--seed", "3", "--stop", "w7"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sft(folder, model, **settings):
    """The config of a run of seconds that learns prompts and completions."""
    rows = [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3}"} for i in range(40)]
    task = {"kind": "sft", "train": str(write(folder / "rows.jsonl", rows)), "max_tokens": 32}
    return tuning(folder, model, task=task, **settings)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a run that is finished, beside its config, its model and rows to answer."""
    folder = tmp_path_factory.mktemp("tuned")
    assert main(["train", str(sft(folder, language_model(folder / "model", "llama"))), "--json"]) == 0
    write(folder / "asked.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    return folder


def answers(capsys, *words):
    """The result of a command, and what it said."""
    capsys.readouterr()
    status = main([*map(str, words), "--json"])
    out, err = capsys.readouterr()
    assert status == 0, err
    return json.loads(out), err


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("choice", [CHOICE, DRAWN], ids=["greedy", "drawn"])
def test_the_answers_to_rows_are_those_of_generate(tuned, tmp_path, capsys, choice):
    out, asked = tmp_path / "out.jsonl", tuned / "asked.jsonl"
    result, err = answers(capsys, "predict", tuned / "config.yaml", asked, "-o", out, *choice)
    due, _ = answers(capsys, "generate", tuned / "run", "--prompts", asked, *choice)
    found = [(row["prompt"], row["answer"], row["tokens"], row["end"]) for row in lines(out)]
    assert found == [(row["prompt"], row["text"], row["tokens"], row["end"]) for row in due["answers"]]
    assert [row["row"] for row in lines(out)] == [1, 2, 3, 4, 5]
    assert result["rows"] == 5
    assert result["tokens"] == sum(row["tokens"] for row in due["answers"])
    assert f"{tuned / 'run'} after step 4" in err
    assert err.count("the newest run of") == 1


def test_a_chat_is_answered_through_its_template_and_the_last_turn_is_what_was_wanted(
    tuned, tmp_path, capsys
):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    rows = write(tmp_path / "chats.jsonl", [{"messages": turns}, {"messages": turns[:1], "id": 7}])
    out = tmp_path / "out.jsonl"
    answers(capsys, "predict", tuned / "run", rows, "-o", out, *CHOICE, "--keep-columns")
    due, _ = answers(capsys, "generate", tuned / "run", "--chat", "--prompt", "w1 w2", *CHOICE)
    first, second = lines(out)
    assert first["answer"] == second["answer"] == due["answers"][0]["text"]
    assert first["messages"] == second["messages"] == turns[:1]
    assert first["wanted"] == "w3"
    assert "wanted" not in second
    assert second["columns"] == {"messages": turns[:1], "id": 7}


def test_an_exported_model_with_its_config_answers_the_same(tuned, tmp_path, capsys):
    of_run, of_model = tmp_path / "run.jsonl", tmp_path / "model.jsonl"
    words = [tuned / "rows.jsonl", *CHOICE, "-o"]
    answers(capsys, "predict", tuned / "run", *words, of_run)
    config = tuned / "config.yaml"
    answers(capsys, "predict", tuned / "run" / "model", *words, of_model, "--config", config)
    assert of_run.read_bytes() == of_model.read_bytes()
    assert lines(of_run)[0]["wanted"] == " w2 w3"


@pytest.mark.parametrize("labels", ["server", "client"])
def test_rows_are_answered_across_the_split_as_in_one_process(tuned, tmp_path, capsys, labels):
    halves, asked = tmp_path / "halves", tuned / "asked.jsonl"
    words = ["--cut", "1", "--labels-at", labels, "--json"]
    assert main(["split", str(tuned / "model"), str(halves), *words]) == 0
    config = sft(tmp_path, tuned / "model", wire={"labels": labels}, output_dir=str(tmp_path / "joined"))
    with Server(halves / "server", tmp_path / "service") as server:
        assert finished(join(halves / "client", server.line, config))["finished"]
        to, out = ["--to", server.line, *DRAWN], tmp_path / "out.jsonl"
        answers(capsys, "predict", tmp_path / "joined", asked, "-o", out, *to)
        due, _ = answers(capsys, "generate", tmp_path / "joined", "--prompts", asked, *to)
        half = tmp_path / "half.jsonl"
        answers(capsys, "predict", halves / "client", asked, "-o", half, "--config", config, *to)
        assert server.stop() == 0
    assert [row["answer"] for row in lines(out)] == [row["text"] for row in due["answers"]]
    assert out.read_bytes() == half.read_bytes()  # the half's config names the run
    here = tmp_path / "here.jsonl"
    answers(capsys, "predict", tuned / "run", asked, "-o", here, *DRAWN)
    if labels == "server":  # the same run in one process, whose halves have the same bits
        assert out.read_bytes() == here.read_bytes()


def test_an_interruption_leaves_no_file(tuned, tmp_path, monkeypatch):
    whole = TextModel.answer

    def stopped(self, prompt, number, *more):
        if number == 2:
            raise KeyboardInterrupt
        return whole(self, prompt, number, *more)

    monkeypatch.setattr(TextModel, "answer", stopped)
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(tuned / "run"), str(tuned / "asked.jsonl"), "-o", str(out), *CHOICE]) == 130
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("row", "choice", "said"),
    [
        (
            {"question": "w1"},
            CHOICE,
            "row 2: the columns are question; one of `messages`, `prompt` and `text`",
        ),
        ({"prompt": "w1 " * 9000}, CHOICE, "row 2: the prompt has 9,000 tokens, the model reads"),
        ({"messages": [{"role": "bot"}]}, CHOICE, "row 2: message 1 of `messages` has the role 'bot'"),
        ({"prompt": "w1"}, ["--temperature", "-1"], "temperature must be 0"),
    ],
)
def test_rows_that_cannot_be_answered_are_refused_before_any_is(tuned, tmp_path, capsys, row, choice, said):
    rows = write(tmp_path / "rows.jsonl", [{"prompt": "w1"}, row])
    out = tmp_path / "out.jsonl"
    capsys.readouterr()
    assert main(["predict", str(tuned / "run"), str(rows), "-o", str(out), *choice]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not out.exists()
