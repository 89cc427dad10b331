import json

import numpy as np
import pytest
import tokenizers

from hosl.errors import TaskError
from hosl.tasks import FilesConfig, PromptsConfig, TextTokenizer, docstrings, load_task
from hosl.tasks.classification import carve
from hosl.tasks.docstrings import documented_functions, standard_library_texts
from hosl.tasks.templates import TEMPLATES


@pytest.fixture
def tokenizer():
    """Byte-level BPE with an opening and a closing special token, as OPT's and BERT's have."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    trained.train_from_iterator(["It was great", "It was terrible", "Yes No Maybe"], trainer)
    trained.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return TextTokenizer(trained, pad_id=0)


@pytest.fixture
def sst2(tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    for split, count, offset in (("train", 60, 0), ("validation", 12, 55)):
        rows = [{"sentence": f"film number {i + offset} ", "label": i % 2, "idx": i} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PromptsConfig(name="SST-2", folder=str(tmp_path), train_rows=30, dev_rows=10)


def _texts(tokenizer, examples):
    return {tokenizer._tokenizer.decode(example.rows[0]) for example in examples}


def test_prompt_splits_are_disjoint_by_text(tokenizer, sst2):
    task = load_task(sst2, tokenizer, seed=0)
    train, dev, test = (_texts(tokenizer, part) for part in (task.train, task.dev, task.test))
    assert (len(train), len(dev), len(test)) == (30, 10, 12)
    assert not train & dev
    assert not (train | dev) & test  # five official train rows stand in validation: they were dropped


def test_another_seed_draws_other_training_rows_and_the_same_test(tokenizer, sst2):
    first, again, other = (load_task(sst2, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.train == again.train
    assert _texts(tokenizer, first.train) != _texts(tokenizer, other.train)
    assert first.test == other.test


def test_the_order_of_a_files_rows_does_not_matter(tokenizer, sst2, tmp_path):
    first = load_task(sst2, tokenizer, seed=0)
    path = tmp_path / "SST-2" / "train.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert load_task(sst2, tokenizer, seed=0).train == first.train


def test_scored_tokens_spell_the_right_option_and_their_logits_stand_one_before(tokenizer, sst2):
    task = load_task(sst2, tokenizer, seed=0)
    batch = task.collate(task.train[:6])
    for row, example in enumerate(task.train[:6]):
        tokens = batch.targets.tokens[row]
        tokens = tokens[tokens >= 0]
        assert tokenizer._tokenizer.decode(tokens.tolist()) == (" terrible", " great")[example.label]
        positions = batch.targets.positions[row][: len(tokens)]
        assert np.array_equal(batch.input_ids[row, positions + 1], tokens)
    assert batch.targets.mask[:, -1].all()  # padded on the left
    assert (batch.input_ids != 2).all()  # no closing special token between prompt and answer


def test_a_long_prompt_loses_its_beginning_never_its_answer(tokenizer, tmp_path):
    folder = tmp_path / "SST-2"
    folder.mkdir()
    rows = [{"sentence": f"{i} " + "long " * 50, "label": i % 2, "idx": i} for i in range(30)]
    for split in ("train", "validation"):
        chosen = rows[:20] if split == "train" else rows[20:]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    config = PromptsConfig(name="SST-2", folder=str(folder), max_tokens=24)
    for example in load_task(config, tokenizer, seed=0).test:
        for row, length, option in zip(
            example.rows, example.option_lengths, (" terrible", " great"), strict=True
        ):
            assert len(row) == 24
            assert row[0] == 1
            assert tokenizer._tokenizer.decode(row[-length:]) == option


def test_the_best_scored_candidate_is_predicted(tokenizer, sst2):
    task = load_task(sst2, tokenizer, seed=0)
    scores = np.array([[-1.0], [-2.0], [-5.0], [-0.5]], dtype=np.float32)
    assert task.predict(task.test[:2], scores).tolist() == [0, 1]
    right = [example.label for example in task.test[:2]]
    assert task.losses(task.test[:2], scores).tolist() == [-scores[right[0], 0], -scores[2 + right[1], 0]]


def test_an_unknown_label_names_file_and_row(tokenizer, sst2, tmp_path):
    path = tmp_path / "SST-2" / "train.jsonl"
    path.write_text(path.read_text() + json.dumps({"sentence": "x", "label": 7, "idx": 99}) + "\n")
    with pytest.raises(TaskError, match=r"train.jsonl, row 61: label `7` is none of `0`, `1`"):
        load_task(sst2, tokenizer, seed=0)


def test_an_unset_variable_in_a_folder_is_named(tokenizer):
    config = PromptsConfig(name="SST-2", folder="$HOSL_NO_SUCH_FOLDER/tasks")
    with pytest.raises(TaskError, match="environment variable in it is not set"):
        load_task(config, tokenizer, seed=0)


def test_docstrings_are_many_and_none_has_two_labels():
    import sysconfig
    from pathlib import Path

    labels, texts = standard_library_texts(Path(sysconfig.get_paths()["stdlib"]))
    assert len(labels) == 20
    assert 2500 < len(texts) < 8000
    assert len({text for text, _ in texts}) == len(texts)


def test_docstrings_under_two_packages_are_dropped(tmp_path):
    for package, own in (("alpha", "only alpha says this"), ("beta", "only beta says this")):
        (tmp_path / package).mkdir()
        (tmp_path / package / "mod.py").write_text(
            f'"""{own}"""\ndef f():\n    """both packages say this"""\n'
        )
    labels, texts = standard_library_texts(tmp_path)
    assert labels == ("alpha", "beta")
    assert sorted(text for text, _ in texts) == ["only alpha says this", "only beta says this"]


def test_carving_keeps_equal_texts_together_and_loses_nothing():
    texts = [(f"t{i // 2}", i % 2) for i in range(40)]
    parts = carve(texts, [0.2, 0.3], seed=3)
    assert sorted(pair for part in parts for pair in part) == sorted(texts)
    names = [{text for text, _ in part} for part in parts]
    assert len(set.union(*names)) == sum(map(len, names))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_every_kind_of_file_gives_the_same_examples(tokenizer, tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"line {i}\nand more", "label": i % 3} for i in range(40)]
    if kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in rows))
    elif kind == "jsonl":
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "parquet":
        path = tmp_path / "rows.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path = tmp_path / "rows"
        path.mkdir()
        table = pyarrow.Table.from_pylist(rows)
        file = pyarrow.OSFile(str(path / "data-00000.arrow"), "wb")
        with file, pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    task = load_task(FilesConfig(train=str(path)), tokenizer, seed=0)
    assert task.labels == ("0", "1", "2")
    found = {
        (tokenizer._tokenizer.decode(e.rows[0]), e.label)
        for part in (task.train, task.dev, task.test)
        for e in part
    }
    assert found == {(r["text"], r["label"]) for r in rows}


def test_classification_rows_are_padded_on_the_right_to_the_longest(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a" * (1 + i), "label": i % 2}) + "\n" for i in range(30)))
    task = load_task(FilesConfig(train=str(path)), tokenizer, seed=0)
    batch = task.collate(task.train[:5])
    lengths = [len(example.rows[0]) for example in task.train[:5]]
    assert batch.input_ids.shape == (5, max(lengths))
    assert batch.targets.mask.sum(axis=1).tolist() == lengths
    assert batch.targets.mask[:, 0].all()


@pytest.mark.parametrize("name", ["SST-2", "CB", "RTE", "WiC", "WSC", "BoolQ"])
@pytest.mark.parametrize(
    "tokenizer_folder",
    ["data/tokenizers/opt", pytest.param("models/minilm-l6-as-opt", marks=pytest.mark.slow)],
)
def test_the_papers_tasks_read_their_real_files(hosl_data, name, tokenizer_folder):
    """Row counts from GLUE's and SuperGLUE's validation splits; every option decodes to its own words."""
    reader = TextTokenizer.load(hosl_data / tokenizer_folder)
    task = load_task(PromptsConfig(name=name, folder=str(hosl_data / "data/tasks")), reader, seed=0)
    counts = {"SST-2": 872, "CB": 56, "RTE": 277, "WiC": 638, "WSC": 104, "BoolQ": 3270}
    assert len(task.test) == counts[name]
    for example in task.test[:20]:
        answers = [
            reader._tokenizer.decode(row[-length:]).strip().lower()
            for row, length in zip(example.rows, example.option_lengths, strict=True)
        ]
        assert answers == [label.lower() for label in task.labels]


@pytest.fixture
def library(tmp_path):
    """A made-up standard library of two packages, with a text of its own each."""
    for package in ("alpha", "beta"):
        (tmp_path / "lib" / package).mkdir(parents=True)
        (tmp_path / "lib" / package / "mod.py").write_text(f'"""only {package} says this"""\n')
    return tmp_path / "lib"


def test_docstrings_are_parsed_once_and_again_when_the_library_changes(library, tmp_path, monkeypatch):
    cache, parsed = tmp_path / "cache" / "docstrings.json", []

    def counted(folder):
        parsed.append(folder)
        return standard_library_texts(folder)

    monkeypatch.setattr(docstrings, "standard_library_texts", counted)
    first = docstrings._kept_texts(library, cache)
    assert first == standard_library_texts(library)
    assert docstrings._kept_texts(library, cache) == first
    assert len(parsed) == 1

    (library / "beta" / "more.py").write_text('"""beta says one thing more"""\n')
    assert ("beta says one thing more", 1) in docstrings._kept_texts(library, cache)[1]
    assert len(parsed) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"made_from": 1}', b'["x"]', b"\xff\xfe"])
def test_a_damaged_cache_of_docstrings_is_replaced(library, tmp_path, damage):
    cache = tmp_path / "docstrings.json"
    found = docstrings._kept_texts(library, cache)
    whole = cache.read_bytes()
    cache.write_bytes(damage)
    assert docstrings._kept_texts(library, cache) == found
    assert cache.read_bytes() == whole


def test_docstrings_are_read_where_nothing_can_be_kept(library, tmp_path):
    (tmp_path / "file").write_text("where a folder is needed")
    found = standard_library_texts(library)
    assert docstrings._kept_texts(library, tmp_path / "file" / "docstrings.json") == found
    assert docstrings._kept_texts(library, None) == found


def test_texts_can_be_kept_ahead_of_the_first_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    docstrings.keep_texts()
    whole = (tmp_path / "hosl" / "docstrings.json").read_bytes()
    assert json.loads(whole)["labels"] == sorted(json.loads(whole)["labels"])
    monkeypatch.setattr(docstrings, "standard_library_texts", None)  # not called again
    docstrings.keep_texts()


def functions(count):
    return "".join(
        f'def f{i}(x):\n    """Number {i} is given back. It says no more."""\n\n    return {i}\n'
        for i in range(count)
    )


def test_a_function_is_its_source_without_the_docstring_and_the_docstrings_first_sentence(tmp_path):
    source = (
        'class C:\n    @staticmethod\n    def f(a, b=("x",)):\n        """Give a,\n        e.g. 1.5 of it. And more.\n'
        '\n        More.\n        """  # one\n\n        return a  # two\n'
    )
    (tmp_path / "abc.py").write_text(source)
    ((row,),) = [rows for rows in documented_functions(tmp_path).values() if rows]
    assert row["completion"] == " Give a, e.g. 1.5 of it."
    assert row["prompt"] == 'def f(a, b=("x",)):\n    return a  # two\n\n# What it does:'


@pytest.mark.parametrize(
    ("left_out", "source"),
    [
        ("no docstring", "def f(x):\n    return x\n"),
        ("a docstring alone", 'def f(x):\n    """Give back what is given."""\n'),
        ("too few words", 'def f(x):\n    """Give it back."""\n    return x\n'),
        ("too many words", f'def f(x):\n    """Give{" it" * 30}."""\n    return x\n'),
        ("no sentence", 'def f(x):\n    """f(x) -> the same x again"""\n    return x\n'),
        ("a long function", 'def f(x):\n    """Give back what is given."""\n' + "    x += 1\n" * 80),
        ("broken code", 'def f(x):\n    """Give back what is given."""\n    return (\n'),
    ],
)  # fmt: skip
def test_functions_that_teach_nothing_are_left_out(tmp_path, left_out, source):
    (tmp_path / "abc.py").write_text(source)
    (tmp_path / "ast.py").write_text(functions(3))
    assert sum(map(len, documented_functions(tmp_path).values())) == 3


def test_embedded_rows_are_of_the_library_that_every_python_has_and_each_is_one(tmp_path):
    (tmp_path / "abc.py").write_text(functions(3) + functions(3))
    (tmp_path / "ast.py").write_text(functions(4))
    for absent in ("tkinter.py", "sitecustomize.py"):
        (tmp_path / absent).write_text(functions(9))
    assert sum(map(len, documented_functions(tmp_path).values())) == 4


def test_a_library_without_functions_is_refused(tmp_path):
    with pytest.raises(
        TaskError, match=r"holds no Python sources to read; give your own rows in task\.train"
    ):
        documented_functions(tmp_path)


def test_the_embedded_rows_are_many_apart_and_the_same_whatever_the_order_of_files(monkeypatch):
    parts = documented_functions()
    assert 1200 < len(parts["train"]) < 5000
    assert 40 < len(parts["dev"]) < 120
    assert 60 < len(parts["test"]) < 150
    rows = [row for part in parts.values() for row in part]
    for column in ("prompt", "completion"):
        assert len({row[column] for row in rows}) == len(rows)
    files = list(docstrings._sources(docstrings._library()))
    monkeypatch.setattr(docstrings, "_sources", lambda library: reversed(files))
    assert documented_functions() == parts


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("is Barack Obama from the USA", "Is Barack Obama from the USA?"),
        ("does iOS run on the iPad?", "Does iOS run on the iPad?"),
        ("can you see NASA's ISS at night", "Can you see NASA's ISS at night?"),
        ("is it so", "Is it so?"),
    ],
)
def test_names_in_a_boolq_question_keep_their_capitals(question, asked):
    """As in MeZO: the first letter is raised, a question mark is put where there is none, nothing else changes."""
    assert (
        TEMPLATES["BoolQ"].prompt({"passage": "Some NASA text.", "question": question})
        == f"Some NASA text. {asked}\n"
    )
