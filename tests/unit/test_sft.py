"""Own text, instructions and chats: which tokens of a row are learned, by hand; what is cut, drawn and refused."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest

from hosl.config import Config
from hosl.core.targets import OptionTargets
from hosl.errors import TaskError
from hosl.methods.schedule import alike_indices, batch_indices, batch_of_step, longest_batch, usual_batch
from hosl.tasks import SftConfig, TextTokenizer, load_task
from hosl.tasks.base import task_digest
from hosl.tasks.docstrings import documented_functions_note
from hosl.tasks.encoding import Encoder
from hosl.tasks.sft.formats import sft_rows
from hosl.tasks.sft.spans import RowEncoder
from tests.unit.test_chat_template import CHATML, LLAMA, MARKED, MISTRAL, saved_tokenizer

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello\n\nthere"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Good bye"},
    {"role": "user", "content": "?"},
]
PAIR = {"prompt": "Say: ", "completion": "Hello there"}
TALK = {"prompt": CHAT[1:2], "completion": CHAT[2:3]}
LATER = {"prompt": CHAT[:4], "completion": CHAT[4:5]}


@pytest.fixture
def tokenizer(tmp_path):
    """`tokenizer(template)` loads a tokenizer with a chat template."""

    def loaded(template=CHATML, **tokens):
        folder = tmp_path / "tokenizer"
        saved_tokenizer(folder, template, **tokens)
        return TextTokenizer.load(folder)

    return loaded


def learned(tokenizer, row, *, loss_on=None, max_tokens=512):
    """The texts of a row's learned spans, and the text of the whole row; special tokens included."""
    rows = RowEncoder(tokenizer, Encoder(tokenizer, max_tokens), loss_on, None)
    example = rows.example(sft_rows([row], "rows.jsonl").rows[0])
    (ids,) = example.rows
    assert all(1 <= start < stop <= len(ids) for start, stop in example.scored)

    def text(part):
        return tokenizer._tokenizer.decode(part, skip_special_tokens=False)

    return [text(ids[start:stop]) for start, stop in example.scored], text(ids)


@pytest.mark.parametrize(
    ("template", "row", "loss_on", "spans"),
    [
        (CHATML, {"text": "Hello there"}, None, ["Hello there</s>"]),
        (CHATML, {"text": "Hello there"}, "all", ["Hello there</s>"]),
        (CHATML, PAIR, None, ["Hello there</s>"]),
        (CHATML, PAIR, "all", ["Say: Hello there</s>"]),
        (CHATML, TALK, None, ["Hello\n\nthere<|im_end|>"]),
        (CHATML, TALK, "assistant", ["Hello\n\nthere<|im_end|>"]),
        (CHATML, {"messages": CHAT}, None, ["Hello\n\nthere<|im_end|>", "Good bye<|im_end|>"]),
        (LLAMA, {"messages": CHAT}, "assistant", ["Hello\n\nthere<|eot_id|>", "Good bye<|eot_id|>"]),
        (LLAMA, TALK, "completion", ["Hello\n\nthere<|eot_id|>"]),
        (MISTRAL, {"messages": CHAT[1:5]}, None, [" Hello\n\nthere</s>", " Good bye</s>"]),
        (MARKED, {"messages": CHAT}, None, ["Hello\n\nthere</s>", "Good bye</s>"]),
        (MARKED, TALK, None, ["Hello\n\nthere</s>"]),
        (MARKED, LATER, None, ["Good bye</s>"]),
        (CHATML, LATER, None, ["Good bye<|im_end|>"]),
        (CHATML, LATER, "assistant", ["Hello\n\nthere<|im_end|>", "Good bye<|im_end|>"]),
    ],
)
def test_the_learned_tokens_are_those_of_the_answers(tokenizer, template, row, loss_on, spans):
    assert learned(tokenizer(template), row, loss_on=loss_on)[0] == spans


def test_all_of_a_chat_is_every_token_after_the_first(tokenizer):
    (span,), whole = learned(tokenizer(LLAMA), {"messages": CHAT}, loss_on="all")
    assert whole == f"<s>{span}"
    assert span.endswith("?<|eot_id|>")


def test_a_chat_is_read_up_to_its_last_answer(tokenizer):
    _, whole = learned(tokenizer(CHATML), {"messages": CHAT})
    assert whole.endswith("<|im_start|>assistant\nGood bye<|im_end|>")


def test_answers_in_a_row_are_one_span_each(tokenizer):
    twice = [CHAT[1], CHAT[2], CHAT[4]]
    spans, _ = learned(tokenizer(CHATML), {"messages": twice})
    assert spans == ["Hello\n\nthere<|im_end|>", "<|im_start|>assistant\nGood bye<|im_end|>"]


def test_a_token_that_joins_prompt_and_completion_is_learned(tokenizer):
    joined = {"prompt": "Good b", "completion": "ye bye"}
    spans, whole = learned(tokenizer(), joined)
    assert whole == "<s>Good bye bye</s>"
    assert spans == [" bye bye</s>"]  # ` bye` is one token


def test_a_text_that_names_its_end_gets_no_second_one_and_without_an_eos_token_there_is_none(tokenizer):
    assert learned(tokenizer(), {"text": "Hello</s>"})[1] == "<s>Hello</s>"
    named = tokenizer(eos_token="<|im_end|>")
    assert learned(named, PAIR)[0] == ["Hello there<|im_end|>"]
    folder = named.folder
    (folder / "tokenizer_config.json").write_text("{}")
    assert learned(TextTokenizer.load(folder), PAIR)[0] == ["Hello there"]
    (folder / "config.json").write_text('{"eos_token_id": [2, 4]}')
    assert learned(TextTokenizer.load(folder), PAIR)[0] == ["Hello there</s>"]


def test_long_prompts_lose_their_beginning_long_texts_their_end_and_answers_nothing(tokenizer):
    loaded = tokenizer()
    prompt = {"prompt": "abcdefghij", "completion": "xyz"}
    assert learned(loaded, prompt, max_tokens=12) == (["xyz</s>"], "<s>defghijxyz</s>")
    assert learned(loaded, prompt, max_tokens=12, loss_on="all") == (["efghijxyz</s>"], "<s>defghijxyz</s>")
    assert learned(loaded, {"text": "abcdefghij"}, max_tokens=8) == (["abcdefg"], "<s>abcdefg")
    spans, whole = learned(loaded, {"messages": CHAT}, max_tokens=32)
    assert spans[-1] == "Good bye<|im_end|>"
    assert "kind" not in whole


def test_an_answer_too_long_loses_its_end_and_the_prompt_keeps_half_a_row_at_most(tokenizer):
    loaded = tokenizer()
    long = {"prompt": "abcdefg", "completion": "qvqvqvqvqvqv"}
    assert learned(loaded, long, max_tokens=9) == (["qvqv"], "<s>defgqvqv")
    assert learned(loaded, long | {"prompt": ""}, max_tokens=9) == (["qvqvqvqv"], "<s>qvqvqvqv")
    with pytest.raises(TaskError, match=r"row 1: the prompt has 8 tokens, max_tokens is 8: there is no room"):
        learned(loaded, long, max_tokens=8)


def test_answers_of_which_the_beginning_is_cut_are_learned_as_far_as_they_stand(tokenizer):
    turns = [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "abcdefghij"},
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "xyz"},
    ]  # fmt: skip
    loaded = tokenizer("{{bos_token}}{% for m in messages %}{{m.content}}{{eos_token}}{% endfor %}")
    assert learned(loaded, {"messages": turns}, max_tokens=13) == (
        ["ghij</s>", "xyz</s>"],
        "<s>fghij</s>q</s>xyz</s>",
    )


def test_a_template_that_rewrites_what_came_before_is_refused_unless_it_marks_the_answers(tokenizer):
    last_alone = (
        "{% for m in messages %}<|im_start|>{{ m.content if m.role == 'user' or loop.last else 'cut' }}<|im_end|>"
        "{% endfor %}"
    )
    row = {"messages": CHAT[1:5]}
    with pytest.raises(
        TaskError, match=r"row 1: the chat template writes the first 2 messages otherwise.*loss_on: all"
    ):
        learned(tokenizer(last_alone), row)
    assert learned(tokenizer(last_alone), row, loss_on="all")
    marking = last_alone.replace("<|im_end|>", "{% generation %}<|im_end|>{% endgeneration %}")
    assert learned(tokenizer(marking), row)[0] == ["<|im_end|>"] * 4


def test_every_kind_of_file_gives_the_same_rows(tmp_path, tokenizer):
    loaded = tokenizer()
    pairs = [{"prompt": f"Say {i}: ", "completion": f"Hello, {i}\nthere"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "rows.json").write_text(json.dumps(pairs))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(pairs)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), tmp_path / "rows.parquet")
    chats = [{"messages": CHAT[: 3 + 2 * (i % 2)]} for i in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    tasks = [
        load_task(SftConfig(train=str(tmp_path / f"rows.{kind}")), loaded, seed=0)
        for kind in ("jsonl", "json", "csv", "parquet")
    ]
    assert len({task_digest(task) for task in tasks}) == 1
    assert [len(part) for part in (tasks[0].train, tasks[0].dev, tasks[0].test)] == [24, 3, 3]
    read = sft_rows(pyarrow.parquet.read_table(tmp_path / "chats.parquet").to_pylist(), "chats")
    assert [row.content for row in read.rows] == [row.content for row in sft_rows(chats, "chats").rows]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_run_says_what_was_drawn_dropped_cut_added_and_not_read(tmp_path, tokenizer):
    rows = [{"text": f"text {i}" + " bye" * (40 * (i == 3)), "id": i} for i in range(20)]
    task = load_task(
        SftConfig(train=write(tmp_path / "t.jsonl", [*rows, rows[0]]), max_tokens=16), tokenizer(), seed=0
    )
    notes = "\n".join(task.notes)
    assert "t.jsonl: rows of `text`; columns that are not read: id" in notes
    assert "1 rows of train are dropped: they repeat another row" in notes
    assert "test (2 rows) and dev (2 rows) drawn from" in notes
    assert "loss_on: all: " in notes
    assert "20 rows get the eos token `</s>`, with which a text ends" in notes
    assert "max_tokens: 16 cuts 1 of 20 rows" in notes
    assert "they are cut at their end" in notes


def test_given_parts_are_kept_and_their_rows_leave_train(tmp_path, tokenizer):
    train = [{"prompt": f"{i}", "completion": "Hello"} for i in range(10)]
    config = SftConfig(
        train=write(tmp_path / "a.jsonl", train), dev=write(tmp_path / "b.jsonl", train[:2]),
        test=write(tmp_path / "c.jsonl", train[1:4]), train_rows=5,
    )  # fmt: skip
    task = load_task(config, tokenizer(), seed=0)
    assert [len(part) for part in (task.train, task.dev, task.test)] == [5, 1, 3]
    assert "5 rows are dropped: they are in dev or test as well" in task.notes
    other = load_task(config, tokenizer(), seed=1)
    assert (task.dev, task.test) == (other.dev, other.test)
    assert task.train != other.train


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"messages": CHAT[:2]}, "`messages` has no turn of the assistant"),
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "message 1 of `messages` has the role 'bot'; known: system",
        ),
        (
            {"messages": [CHAT[1], {"role": "assistant", "content": " "}]},
            "message 2 of `messages` is an answer without",
        ),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "has the keys from, value; {role, content} is wanted",
        ),
        (
            {"messages": "Hi"},
            "`messages` is text; a list of {role, content} is wanted; a file of separated values",
        ),
        (
            {"messages": [CHAT[1], {"role": "assistant", "content": 5}]},
            "the content of message 2 of `messages` is a num",
        ),
        ({"prompt": "x", "completion": "  "}, "`completion` is empty; fill it or drop the row"),
        ({"prompt": "x", "completion": []}, "one of `prompt` and `completion` is a list of messages"),
        (
            {"prompt": CHAT[1:2], "completion": CHAT[2:4]},
            "`completion` has a turn of user; it is the assistant's alone",
        ),
        ({"prompt": 5, "completion": "x"}, "`prompt` is a number; text is wanted"),
        ({"text": ""}, "`text` is empty"),
        ({"text": "a\ud800"}, "half a character"),
        (
            {"conversations": []},
            "the columns are conversations; known formats: `messages`, or `prompt` and `completion`,",
        ),
        (
            {"instruction": "x", "output": "y"},
            "rename `instruction` to `prompt` and `output` to `completion`?",
        ),
        ({"mesages": []}, "rename `mesages` to `messages`?"),
        ({"messages": CHAT, "tools": "{"}, "`tools` is not JSON"),
    ],
)
def test_a_row_that_cannot_be_learned_is_refused_by_its_number(row, fault):
    with pytest.raises(TaskError) as refused:
        sft_rows([row, row], "rows.jsonl")
    assert str(refused.value).startswith("rows.jsonl, row 1")
    assert fault in str(refused.value)
    assert "\n" not in str(refused.value)


def test_files_of_two_formats_without_rows_and_settings_that_mean_nothing_are_refused(tmp_path, tokenizer):
    with pytest.raises(TaskError, match="row 2 is `text`, the rows before it are `prompt` and `completion`"):
        sft_rows([PAIR, {"text": "x"}], "rows.jsonl")
    with pytest.raises(TaskError, match="holds no rows"):
        sft_rows([], "rows.jsonl")
    with pytest.raises(
        TaskError, match=r"row 1: task.loss_on: assistant means nothing.*allowed: completion, all"
    ):
        learned(tokenizer(), PAIR, loss_on="assistant")
    with pytest.raises(TaskError, match="row 1: the chat template fails on these messages: Only user and"):
        learned(tokenizer(MISTRAL), {"messages": CHAT})
    with pytest.raises(TaskError, match="no row is left for train"):
        load_task(SftConfig(train=write(tmp_path / "t.jsonl", [PAIR])), tokenizer(), seed=0)


def test_the_embedded_rows_have_parts_of_their_own(tokenizer, monkeypatch):
    parts = {
        "train": [{"prompt": f"{i}", "completion": " x"} for i in range(5)],
        "dev": [{"prompt": "d", "completion": " x"}], "test": [{"prompt": "t", "completion": " x"}] * 2,
    }  # fmt: skip
    monkeypatch.setattr("hosl.tasks.sft.task.documented_functions", lambda: parts)
    task = load_task(SftConfig(train="python-docstrings", train_rows=3), tokenizer(), seed=0)
    assert [len(part) for part in (task.train, task.dev, task.test)] == [3, 1, 2]
    assert task.notes[:2] == (
        documented_functions_note(),
        "python-docstrings: rows of `prompt` and `completion`",
    )
    assert not any("drawn" in note or "dropped" in note for note in task.notes)


LENGTHS = tuple((7 * i * i + 3) % 97 for i in range(101))


@pytest.mark.parametrize(("batch", "rows"), [(8, 101), (8, 96), (16, 5), (1, 7)])
def test_batches_of_like_lengths_have_every_example_once_in_an_epoch(batch, rows):
    lengths = LENGTHS[:rows]
    steps = 3 * rows // batch
    drawn = [i for step in range(1, steps + 2) for i in alike_indices(5, step, batch, lengths)]
    for epoch in range(3):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert drawn[:rows] != drawn[rows : 2 * rows] or rows == 1


def test_batches_of_like_lengths_pad_less_and_another_seed_draws_others():
    def padding(of_step):
        batches = [[LENGTHS[i] for i in of_step(step)] for step in range(1, 60)]
        return sum(max(lengths) * len(lengths) - sum(lengths) for lengths in batches)

    alike = padding(lambda step: alike_indices(0, step, 8, LENGTHS))
    assert alike < 0.4 * padding(lambda step: batch_indices(0, step, 8, len(LENGTHS)))
    assert alike_indices(0, 3, 8, LENGTHS) != alike_indices(1, 3, 8, LENGTHS)


@pytest.mark.parametrize("alike", [False, True])
def test_the_usual_batch_is_the_mean_of_those_that_are_drawn(tokenizer, tmp_path, alike):
    file = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Say {i}: ", "completion": "Hello there" * (1 if i % 5 else 20)} for i in range(60)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = SftConfig(train=str(file), group_by_length=alike)
    task = load_task(settings, tokenizer(), seed=0)
    config = Config(task=settings, max_steps=30, per_device_train_batch_size=2)
    drawn = [batch_of_step(config, task, step) for step in range(1, 31)]
    assert all(isinstance(batch.targets, OptionTargets) for batch in drawn)
    widths = [batch.input_ids.shape[1] for batch in drawn]
    learned = sum(int((batch.targets.tokens >= 0).sum()) for batch in drawn)
    tokens, scored = usual_batch(task, config)
    assert tokens == round(sum(widths) / 30) < longest_batch(task, config)[1]
    assert scored == -(-learned // 60)
