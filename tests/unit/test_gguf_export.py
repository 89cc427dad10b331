"""Models that hosl writes as GGUF, read back by transformers' own reader."""

import json

import pytest
import tokenizers
import torch
import transformers as hf

from hosl.errors import ConfigError, FolderError
from tests.conftest import build

pytest.importorskip("gguf")

from hosl.split.gguf_export import write_gguf

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
TEXTS = ["The answer is 42.", "def f(x):\n    return x  # naïve", "two  spaces inside"]


def _tokenizer(kind):
    """A small tokenizer of 97 ids, as SmolLM2's is made or as Llama 2's."""
    if kind == "spm":
        made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        made.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Replace("▁", " ")])
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        before = tokenizers.pre_tokenizers
        made.pre_tokenizer = before.Sequence(
            [before.Digits(individual_digits=True), before.ByteLevel(add_prefix_space=False)]
        )
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


@pytest.fixture(params=["tied", "untied"])
def folder(request, tmp_path):
    """A tiny Llama with a tokenizer and a chat template; its heads are grouped."""
    model = build("llama")
    if request.param == "tied":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**model.config.to_dict() | {"tie_word_embeddings": True}))
    model.save_pretrained(tmp_path / "model")
    _tokenizer("bytes").save(str(tmp_path / "model" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE
    }  # fmt: skip
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path / "model"


def _read(out, **how):
    return hf.AutoModelForCausalLM.from_pretrained(out.parent, gguf_file=out.name, **how)


def test_transformers_reads_the_weights_back_to_the_bit(folder, tmp_path):
    out, said = tmp_path / "model.gguf", []
    assert write_gguf(folder, out, said.append) == out.stat().st_size
    assert said == []
    found, model = _read(out, dtype=torch.float32), hf.AutoModelForCausalLM.from_pretrained(folder)
    assert found.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = torch.arange(3, 20)[None]
    assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert [p.name for p in tmp_path.glob(".*")] == []


@pytest.mark.parametrize("kind", ["bytes", "spm"])
@pytest.mark.parametrize("folder", ["tied"], indirect=True)
def test_transformers_reads_the_tokenizer_back(folder, tmp_path, kind):
    out, said = tmp_path / "model.gguf", []
    _tokenizer(kind).save(str(folder / "tokenizer.json"))
    write_gguf(folder, out, said.append)
    assert said == []
    found = hf.AutoTokenizer.from_pretrained(tmp_path, gguf_file=out.name)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    assert found.convert_tokens_to_ids(list(vocabulary)) == list(vocabulary.values())
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False) == tokenizer.encode(text).ids
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    assert found.chat_template == TEMPLATE


def test_float16_rounds_matrices_and_keeps_vectors(folder, tmp_path):
    out = tmp_path / "model.gguf"
    write_gguf(folder, out, lambda text: None, dtype="float16")
    found, model = _read(out, dtype=torch.float32), hf.AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in model.state_dict().items():
        expected = tensor.half().float() if tensor.dim() > 1 else tensor
        assert torch.equal(found.state_dict()[name], expected), name


def test_what_llama_cpp_has_no_name_for_is_refused_or_said(folder, tmp_path, tiny):
    out, said = tmp_path / "out.gguf", []
    (folder / "tokenizer.json").unlink()
    write_gguf(folder, out, said.append)
    assert "out.gguf holds no tokenizer: the model's folder has no tokenizer.json" in said[0]
    with pytest.raises(FolderError, match="nothing is overwritten"):
        write_gguf(folder, out, said.append)
    out.unlink()
    config = json.loads((folder / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    with pytest.raises(ConfigError, match="rotary scaling linear is not written"):
        write_gguf(folder, out, said.append)
    tiny("qwen2").save_pretrained(tmp_path / "qwen2")
    with pytest.raises(ConfigError, match="of the family llama, this is a qwen2"):
        write_gguf(tmp_path / "qwen2", out, said.append)
    assert [p.name for p in tmp_path.iterdir() if ".gguf" in p.name] == []
