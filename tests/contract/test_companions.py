"""What a model's folder holds beside weights goes with the model: by train, split and export."""

import json

import pytest
import transformers as hf

from hosl.split import export_checkpoint, split_folder, split_model
from tests.contract.test_tokenizers import _write

_TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
_COMPANIONS = {
    "generation_config.json": json.dumps({"max_new_tokens": 7, "temperature": 0.5, "do_sample": True}),
    "chat_template.jinja": _TEMPLATE,
    "additional_chat_templates/tools.jinja": "tools",
    "added_tokens.json": "{}", "tokenizer.model": "a", "sentencepiece.bpe.model": "b", "spiece.model": "c",
    "vocab.txt": "d", "merges.txt": "e", "qwen.tiktoken": "f", "preprocessor_config.json": "{}", "LICENSE": "g",
    "modules.json": "[]", "1_Pooling/config.json": "{}",
}  # fmt: skip
_LEFT = {
    "pytorch_model.bin": "w", "model.safetensors.index.json": "{}", "adapter_config.json": "{}", "tf_model.h5": "w",
    "adapter_model.safetensors": "w", "model.gguf": "w", "modeling_own.py": "w", "rows.csv": "text,label",
    "train.jsonl": "{}", ".gitattributes": "w", "onnx/model.json": "w", "checkpoint-5/trainer_state.json": "w",
}  # fmt: skip


@pytest.fixture
def folder(tiny, tmp_path):
    """The folder of a tiny language model with all that hubs have beside weights."""
    (tmp_path / "secret.txt").write_text("outside")
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    return folder


def _add(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def _names(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_an_export_has_the_chat_template_and_all_else_beside_weights(folder, tiny, tmp_path):
    _write(folder, "llama")
    _add(folder, _COMPANIONS | _LEFT)
    client_half, server_half = split_model(tiny("llama"), 1)
    export_checkpoint(client_half, server_half, tmp_path / "out", folder=folder)
    own = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert _names(tmp_path / "out") == own | _COMPANIONS.keys()
    for name, content in _COMPANIONS.items():
        assert (tmp_path / "out" / name).read_text() == content
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    generation = hf.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.max_new_tokens, generation.temperature) == (7, 0.5)
    said = hf.AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "the x"}], tokenize=False
    )
    assert said == "[user] the x"
    assert hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 7


def test_the_devices_half_has_them_too_and_keeps_its_own_files(folder, tmp_path):
    _write(folder, "bert")
    _add(folder, _COMPANIONS | {"half.json": "another", "vocab.json": "{}"})
    split_folder(str(folder), 1, tmp_path / "halves")
    own = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "half.json"}
    assert _names(tmp_path / "halves" / "client") == own | _COMPANIONS.keys() | {"vocab.json"}
    assert json.loads((tmp_path / "halves" / "client" / "half.json").read_text())["side"] == "client"


def test_files_of_the_hubs_cache_are_links_and_are_copied(tiny, tmp_path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/1234"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "5678").write_text(_TEMPLATE)
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/5678")
    client_half, server_half = split_model(tiny("llama"), 1)
    export_checkpoint(client_half, server_half, tmp_path / "out", folder=snapshot)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == _TEMPLATE
    assert not (tmp_path / "out" / "chat_template.jinja").is_symlink()
