"""Token ids of a run, and of a device after `hosl split`, against plain AutoTokenizer."""

import json
import random

import pytest
import transformers as hf
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from hosl.errors import ModelError
from hosl.split import resolve_model_folder, split_folder, transformers_tokenizer
from hosl.tasks import TextTokenizer

_SENTENCES = [
    "The Café in Zürich isn't cheap, but its CRÈME brûlée is!", "le garçon naïf a été à l'école",
    "3,141.59 and 2 \u00d7 2",
    "日本語と中文の文字", "def f(x):\n\treturn x ** 2", "SHOUTING and whispering", "e-mail me at a_b@c.org", "ﬁne ﬂour",
    "  leading and trailing  ", "two  spaces", "emoji 😀 and 👩‍💻", "“quotes” \u2013 dashes… and\u00a0spaces", "x",
    "ÅNGSTRÖM Ünïcödé", "hello [MASK] world <mask> </s> <|endoftext|>",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """200 texts: sentences, their pieces in other orders, in upper case, and what is left when accents are apart."""
    shuffled = random.Random(5)
    words = [word for sentence in _SENTENCES for word in sentence.split(" ")]
    drawn = [" ".join(shuffled.choices(words, k=shuffled.randint(1, 12))) for _ in range(155)]
    return [*_SENTENCES, *(s.upper() for s in _SENTENCES), *(s.replace(" ", "") for s in _SENTENCES), *drawn]


def _wordpiece(lowercase, names=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # both cases are in the vocabulary, so that an ignored setting is other ids and not [UNK] twice
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(names), show_progress=False)
    tokenizer.train_from_iterator([*_SENTENCES, *map(str.lower, _SENTENCES)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _padded_and_cut():
    tokenizer = _wordpiece(True)
    tokenizer.enable_padding(length=12)
    tokenizer.enable_truncation(8)
    return tokenizer


def _byte_level(special, *, normalizer=None, prefix=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _roberta():
    tokenizer = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    return tokenizer


def _metaspace(special):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer


def _unigram(special):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return tokenizer


def _words():
    tokenizer = Tokenizer(
        models.WordLevel({"[PAD]": 0, "[UNK]": 1, "the": 2, "The": 3, "x": 4}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


_EOT = "<|endoftext|>"
_LLAMA_SPECIAL = ["<unk>", "<s>", "</s>"]
_MORE = {"content": "Zürich", "special": False, "normalized": True}
_MORE |= dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
_ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_GPT2 = {"unk_token": _EOT, "bos_token": _EOT}


def _uncased():
    return _wordpiece(True)


def _cased():
    return _wordpiece(False)


def _gpt2():
    return _byte_level([_EOT])


def _nfc():
    return _byte_level([_EOT], normalizer=normalizers.NFC())


def _opt():
    return _byte_level(["<s>", "<pad>", "</s>", "<unk>"])


def _llama():
    return _metaspace(_LLAMA_SPECIAL)


def _gemma():
    return _metaspace(["<pad>", "<eos>", "<bos>", "<unk>"])


def _t5():
    return _unigram(["<pad>", "<unk>", "</s>"])


# name -> model_type, tokenizer.json, and tokenizer_config.json: the class and its settings
KINDS = {
    "bert": ("bert", _uncased, "BertTokenizer", {}),
    "bert, do_lower_case off": ("bert", _uncased, "BertTokenizer", {"do_lower_case": False}),
    "bert, do_lower_case on": ("bert", _cased, "BertTokenizerFast", {"do_lower_case": True}),
    "bert, strip_accents off": ("bert", _uncased, "BertTokenizer", {"strip_accents": False}),
    "bert, strip_accents on": ("bert", _cased, "BertTokenizer", {"do_lower_case": False, "strip_accents": True}),
    "bert, Chinese characters": ("bert", _uncased, "BertTokenizer", {"tokenize_chinese_chars": False}),
    "bert, padded and cut": ("bert", _padded_and_cut, "BertTokenizer", {}),
    "bert without tokenizer_config.json": ("bert", _cased, None, {}),
    "distilbert": ("distilbert", _uncased, "DistilBertTokenizer", {"do_lower_case": False}),
    "roberta": ("roberta", _roberta, "RobertaTokenizer", {}),
    "roberta, add_prefix_space": ("roberta", _roberta, "RobertaTokenizer", {"add_prefix_space": True}),
    "gpt2": ("gpt2", _gpt2, "GPT2Tokenizer", _GPT2),
    "gpt2, add_prefix_space": ("gpt2", _gpt2, "GPT2Tokenizer", _GPT2 | {"add_prefix_space": True}),
    "gpt2, add_bos_token": ("gpt2", _gpt2, "GPT2Tokenizer", _GPT2 | {"add_bos_token": True}),
    "opt": ("opt", _opt, "GPT2Tokenizer", _ENDS | {"bos_token": "</s>", "add_bos_token": True}),
    "gpt_neox": ("gpt_neox", _gpt2, "GPTNeoXTokenizer", {"unk_token": _EOT}),
    "qwen2": ("qwen2", _nfc, "Qwen2Tokenizer", {}),
    "llama": ("llama", _llama, "LlamaTokenizer", _ENDS | {"add_bos_token": True}),
    "llama, add_eos_token": (
        "llama", _llama, "LlamaTokenizer", _ENDS | {"add_bos_token": True, "add_eos_token": True},
    ),
    "llama 3": ("llama", _opt, "LlamaTokenizer", _ENDS),
    "gemma2": ("gemma2", _gemma, "GemmaTokenizer", {}),
    "unigram": ("opt", _t5, "T5Tokenizer", {"extra_ids": 0}),
    "words": ("bert", _words, "PreTrainedTokenizerFast", {}),
    "added tokens": (
        "opt", _words, "PreTrainedTokenizerFast", {"added_tokens_decoder": {"7": _MORE}, "bos_token": "<begin>"},
    ),
}  # fmt: skip


def _write(folder, kind):
    model_type, build, tokenizer_class, settings = KINDS[kind]
    folder.mkdir(exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_class is not None:
        settings = {"tokenizer_class": tokenizer_class} | settings
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_autotokenizer(tmp_path, texts, kind):
    _write(tmp_path / "model", kind)
    oracle = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = [oracle(text)["input_ids"] for text in texts]
    read = TextTokenizer.load(tmp_path / "model", transformers_tokenizer)
    assert [list(read.encode(text, 10_000)) for text in texts] == expected
    for text in texts[:15]:
        assert list(read.encode(text, 9)) == oracle(text, truncation=True, max_length=9)["input_ids"]


@pytest.mark.parametrize(
    "kind", ["bert, do_lower_case off", "bert, strip_accents off", "roberta, add_prefix_space"]
)
def test_a_device_reads_the_same_ids_after_the_split(tmp_path, tiny, texts, kind):
    """It has no transformers, so the settings of tokenizer_config.json stand in the half's tokenizer.json."""
    tiny(KINDS[kind][0]).save_pretrained(tmp_path / "model")
    _write(tmp_path / "model", kind)
    split_folder(str(tmp_path / "model"), 1, tmp_path / "halves", head="classification", num_labels=5)
    oracle = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    device = TextTokenizer.load(tmp_path / "halves" / "client")
    assert [list(device.encode(text, 10_000)) for text in texts] == [
        oracle(text)["input_ids"] for text in texts
    ]
    verbatim = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert [verbatim.encode(text).ids for text in texts] != [oracle(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "minilm-l6-as-opt", "stories260K-hf"])
def test_real_tokenizers_read_as_before(hosl_data, texts, name):
    """Runs on these models keep their bits: tokenizer.json as it is, AutoTokenizer's ids, and ours are equal."""
    folder = hosl_data / "models" / name if "-L6-v2" not in name else resolve_model_folder(name)
    plain, full = TextTokenizer.load(folder), TextTokenizer.load(folder, transformers_tokenizer)
    oracle = hf.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        assert plain.encode(text, 10_000) == full.encode(text, 10_000) == tuple(oracle(text)["input_ids"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "ByT5Tokenizer"}, "its tokenizer, ByT5Tokenizer, does not give the same ids"),
        (
            {"tokenizer_class": "CanineTokenizer"},
            "its tokenizer, CanineTokenizer, does not give the same ids",
        ),
        (
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "unk_token": "The x",
                "split_special_tokens": True,
            },
            "does not give the same ids by the tokenizers library alone",
        ),
    ],
)
def test_a_tokenizer_that_a_device_cannot_read_is_refused_by_name(tmp_path, tiny, settings, said):
    tiny("bert").save_pretrained(tmp_path / "model")
    _write(tmp_path / "model", "words")
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=said):
        TextTokenizer.load(tmp_path / "model", transformers_tokenizer)
    with pytest.raises(ModelError, match=said):
        split_folder(str(tmp_path / "model"), 1, tmp_path / "halves", head="classification")
    assert not (tmp_path / "halves").exists()


def test_a_special_token_of_the_tokenizer_keeps_its_own_settings(tmp_path):
    """lstrip of [MASK] decides what becomes of the space before it."""
    tokenizer = _wordpiece(True)
    tokenizer.add_special_tokens([AddedToken("<there>", lstrip=True, special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    oracle = hf.AutoTokenizer.from_pretrained(tmp_path)
    read = TextTokenizer.load(tmp_path, transformers_tokenizer)
    for text in ("hello <there> x", "hello   <there>x", "<there>"):
        assert list(read.encode(text, 100)) == oracle(text)["input_ids"]
