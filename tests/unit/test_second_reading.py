"""Inputs of a reader who had not seen the code: each was wrong without a word, or ended in a traceback."""

import json

import pytest
import tokenizers
import transformers as hf
from tokenizers import processors

from hosl.errors import TaskError
from hosl.split import export_checkpoint, split_model
from hosl.system.run_folder import read_record
from hosl.tasks import TextTokenizer


def _saved(folder, letters, side):
    """A tokenizer of single letters that drops all others, with [CLS] and [SEP] around, by transformers."""
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2} | {letter: 3 + i for i, letter in enumerate(letters)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        truncation_side=side,
    )
    fast.save_pretrained(folder)
    return hf.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("letters", ["ACGT", "abcd", "0123"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, 10, 11, 40])
def test_a_long_text_is_cut_where_transformers_cuts_it(tmp_path, letters, side, length):
    theirs = _saved(tmp_path, letters, side)
    text = (letters * 10)[:length]
    expected = theirs(text, truncation=True, max_length=12)["input_ids"]
    assert list(TextTokenizer.load(tmp_path).encode(text, 12)) == expected


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "7"])
def test_damaged_settings_beside_a_tokenizer_are_named(tmp_path, content):
    _saved(tmp_path, "abcd", "right")
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TaskError, match=r"tokenizer_config\.json"):
        TextTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "kind", ["multi_label_classification", "regression", "single_label_classification", None]
)
def test_an_export_is_of_the_kind_that_was_trained(tmp_path, tiny, kind):
    model = tiny("bert")
    model.config.problem_type = kind
    client, server = split_model(model, 1)
    export_checkpoint(client, server, tmp_path / "out", labels=list("abcde"))
    wanted = kind and "single_label_classification"
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").problem_type == wanted


@pytest.mark.parametrize("content", ["{}", "[]", "", "null"])
def test_an_empty_record_counts_as_damaged(tmp_path, content):
    (tmp_path / "record.json").write_text(content)
    assert read_record(tmp_path) is None
    (tmp_path / "record.json").write_text(json.dumps({"run_id": "a"}))
    assert read_record(tmp_path) == {"run_id": "a"}
