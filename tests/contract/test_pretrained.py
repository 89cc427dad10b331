"""Model folders as people have them: what plain transformers reads from a sound one is read, all else is refused."""

import json
import re

import pytest
import safetensors.torch
import torch
import transformers as hf

from hosl.errors import ConfigError, HoslError, ModelError, SplitError
from hosl.split import load_half, load_model, split_folder

BOTH = ["train", "split"]


def _head(model):
    return "causal" if hasattr(model, "lm_head") else "classification"


def _saved(model, folder, **options):
    model.save_pretrained(folder, **options)
    return folder


def _tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def _rewrite(folder, change):
    """Store the tensors of a folder as `change` gives them."""
    tensors = change(_tensors(folder))
    safetensors.torch.save_file(
        {key: t.contiguous() for key, t in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def _set(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def _read(folder, how, head="causal", labels=None, dtype=torch.float32, seed=3):
    """All tensors of the model by name, by `hosl train`'s way or by `hosl split`'s."""
    if how == "train":
        loaded = load_model(str(folder), head=head, num_labels=labels, seed=seed, dtype=dtype)
        return loaded.model.state_dict()
    out = folder.parent / f"{folder.name}-halves"
    split_folder(folder, 1, out, head=head, num_labels=labels, seed=seed)
    halves = [load_half(out / side, dtype) for side in ("client", "server")]
    return halves[0].state_dict() | halves[1].state_dict()


def _refused(folder, how, match, head="causal", labels=None, error=HoslError):
    before = sorted(folder.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        _read(folder, how, head, labels)
    assert len(str(caught.value)) < 800
    assert sorted(folder.parent.iterdir()) == before  # nothing half-made stays


def _same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_is_read_as_plain_transformers_reads_it(model_name, tiny, tmp_path, how, dtype):
    model = tiny(model_name)
    folder = _saved(model, tmp_path / "model")
    plain = type(model).from_pretrained(folder, dtype=dtype)
    _same(_read(folder, how, _head(model), 5, dtype), plain.state_dict())


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "base_model.model."])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_weights_saved_from_a_wrapped_model_are_refused_and_the_wrapper_named(
    tiny, tmp_path, name, wrapper, how
):
    model = tiny(name)
    folder = _saved(model, tmp_path / "model")
    _rewrite(folder, lambda tensors: {wrapper + key: t for key, t in tensors.items()})
    _refused(folder, how, r"the checkpoint lacks .*a wrapper was saved", _head(model), 5, ModelError)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("llama", "model.layers.1."),
        ("gpt2", "transformer.h.2."),
        ("bert", "bert.encoder.layer.0."),
        ("llama", "model.layers.0.mlp.up_proj.weight"),
        ("opt", "model.decoder.final_layer_norm.bias"),
        ("gemma2", "model.embed_tokens.weight"),
        ("gpt_neox", "lm_head.weight"),
        ("llama", "lm_head.weight"),
        ("phi3", "lm_head.weight"),
        ("llama", "model.norm.weight"),
        ("bert", "classifier.bias"),
        ("bert", "bert.pooler"),
        ("distilbert", "pre_classifier"),
        ("roberta", "classifier.dense"),
    ],
)
def test_a_checkpoint_that_lacks_a_layer_a_tensor_or_a_head_is_refused(tiny, tmp_path, name, lost, how):
    model = tiny(name)
    folder = _saved(model, tmp_path / "model")
    former = {"lm_head.weight": "embed_out"}.get(lost, lost)  # GPT-NeoX stores its head as embed_out
    _rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if lost not in k and former not in k})
    _refused(folder, how, f"the checkpoint lacks {re.escape(lost)}", _head(model), 5, ModelError)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("stored", ["no head", "a head of another task"])
def test_only_the_head_of_a_new_task_is_drawn_and_that_is_said(tiny, tmp_path, name, stored, how):
    model = tiny(name)
    folder = _saved(model.base_model if stored == "no head" else model, tmp_path / "model")
    plain, info = hf.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    drawn = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    loaded = load_model(str(folder), head="classification", num_labels=7, seed=3)
    assert set(loaded.initialised) == drawn
    assert any("drawn from the seed" in note for note in loaded.notes)
    assert any("in place of the stored classifier" in note for note in loaded.notes) == (stored != "no head")
    found = _read(folder, how, "classification", 7)
    _same(found, loaded.model.state_dict())
    _same(
        {k: t for k, t in found.items() if k not in drawn},
        {k: t for k, t in plain.state_dict().items() if k not in drawn},
    )


@pytest.mark.parametrize("how", BOTH)
def test_a_checkpoint_in_two_shards_is_read_whole(tiny, tmp_path, how):
    model = tiny("llama")
    folder = _saved(model, tmp_path / "model", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    _same(_read(folder, how), model.state_dict())
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    with pytest.raises(ModelError, match=r"index.json names model-0000\d-of-0000\d.safetensors, not in"):
        load_model(str(folder), head="causal", num_labels=None, seed=0)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("copy", ["model-old", "zz", "pytorch_model", "consolidated"])
def test_a_stale_copy_beside_the_weights_is_not_read(tiny, tmp_path, how, copy):
    model = tiny("gpt2")
    folder = _saved(model, tmp_path / "model")
    safetensors.torch.save_file(
        {key: t + 1 for key, t in _tensors(folder).items()}, folder / f"{copy}.safetensors"
    )
    _same(_read(folder, how), type(model).from_pretrained(folder).state_dict())


@pytest.mark.parametrize("how", BOTH)
def test_a_folder_saved_into_twice_is_read_as_transformers_reads_it_or_refused(tiny, tmp_path, how):
    old, new = tiny("llama", seed=1), tiny("llama", seed=2)
    whole_last = _saved(new, _saved(old, tmp_path / "whole-last", max_shard_size="60KB"))
    assert (whole_last / "model.safetensors.index.json").is_file()  # transformers leaves the old index
    _same(_read(whole_last, how), new.state_dict())
    shards_last = _saved(new, _saved(old, tmp_path / "shards-last"), max_shard_size="60KB")
    plain = hf.AutoModelForCausalLM.from_pretrained(shards_last)
    assert torch.equal(plain.lm_head.weight, old.lm_head.weight)  # transformers reads the stale one
    _refused(shards_last, how, "nobody can tell which is the newer", error=ModelError)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own affair
@pytest.mark.parametrize("how", BOTH)
def test_an_adapter_in_the_folder_is_named_and_not_applied(tiny, tmp_path, how):
    import peft

    model = tiny("llama")
    folder = _saved(model, tmp_path / "model")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(1.0)
    adapted.save_pretrained(folder)
    _same(_read(folder, how), model.state_dict())
    notes = load_model(str(folder), head="causal", num_labels=None, seed=0).notes
    assert notes == (
        "adapter_model.safetensors beside the model is not applied; merge it first if it is wanted",
    )
    alone = tmp_path / "alone"
    adapted.save_pretrained(alone)
    _refused(alone, how, "holds a PEFT adapter only; merge it", error=ModelError)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", ["opt", "gpt2", "gemma2", "llama", "qwen2"])
@pytest.mark.parametrize("twin", ["head", "embedding", "both"])
def test_a_tied_model_is_read_from_either_twin(tiny, tmp_path, name, twin, how):
    model = tiny(name)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder = _saved(model, tmp_path / "model")
    ((head, embedding),) = type(model)._tied_weights_keys.items()

    def store(tensors):
        shared = tensors.pop(embedding)
        kept = {"head": [head], "embedding": [embedding], "both": [head, embedding]}[twin]
        return tensors | {key: shared.clone() for key in kept}

    _rewrite(folder, store)
    expected = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(expected.state_dict()[head], model.state_dict()[embedding])
    _same(_read(folder, how), expected.state_dict())
    if how == "train":
        loaded = load_model(str(folder), head="causal", num_labels=None, seed=0).model
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("name", ["opt", "gemma3"])
def test_a_model_said_to_be_tied_with_two_different_twins_keeps_both_as_in_transformers(
    tiny, tmp_path, name, how
):
    model = tiny(name)
    folder = _saved(model, tmp_path / "model")
    ((head, embedding),) = type(model)._tied_weights_keys.items()
    _rewrite(folder, lambda tensors: tensors | {head: tensors[embedding] + 1})
    plain = hf.AutoModelForCausalLM.from_pretrained(folder)
    assert not torch.equal(plain.state_dict()[head], plain.state_dict()[embedding])
    _same(_read(folder, how), plain.state_dict())
    loaded = load_model(str(folder), head="causal", num_labels=None, seed=0)
    assert any("two different ones: both are read" in note for note in loaded.notes)
    assert not loaded.model.config.tie_word_embeddings


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
    ],
)
def test_a_quantised_checkpoint_is_refused_by_name(tiny, tmp_path, settings, named, how):
    folder = _saved(tiny("llama"), tmp_path / "model")
    _set(folder, **settings)
    _refused(folder, how, rf"is quantised \({named}\)", error=ModelError)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("stored", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused_though_the_config_does_not_say_so(
    tiny, tmp_path, stored, how
):
    folder = _saved(tiny("llama"), tmp_path / "model")
    _rewrite(folder, lambda tensors: {k: t.to(stored) if "q_proj" in k else t for k, t in tensors.items()})
    _refused(folder, how, "q_proj.weight is stored as (I8|U8|F8_E4M3), so it is quantised", error=ModelError)


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"model_type": "frobnicator"}, SplitError, "model_type 'frobnicator' is unknown to transformers"),
        ({"model_type": "t5"}, SplitError, "transformers has no causal model of model_type 't5'"),
        ({"model_type": "xglm"}, SplitError, r"XGLMForCausalLM .*'xglm'.*no such family"),
        ({"model_type": None}, ConfigError, "has no model_type"),
        ({"hidden_size": -4}, ConfigError, "no model can be built"),
        ({"hidden_size": 10**30}, ConfigError, "no model can be built"),
        ({"hidden_size": "wide"}, ConfigError, "config.json is no config that transformers takes"),
        ({"num_attention_heads": 0}, ConfigError, "(no model can be built|is no config)"),
        ({"num_hidden_layers": 10**9}, ConfigError, "num_hidden_layers must lie in 1..1000, got 1000000000"),
        ({"num_hidden_layers": -3}, ConfigError, "num_hidden_layers must lie in 1..1000, got -3"),
        ({"num_hidden_layers": 5}, ModelError, r"lacks model.layers.3.* and \d+ more"),
        ({"vocab_size": 10**12}, ModelError, "lm_head.weight has another shape in the weights"),
        ({"hidden_size": 64}, ModelError, "has another shape in the weights"),
    ],
)
def test_a_config_that_is_no_model_of_ours_ends_in_one_line(tiny, tmp_path, settings, error, match, how):
    folder = _saved(tiny("llama"), tmp_path / "model")
    _set(folder, **settings)
    _refused(folder, how, match, error=error)


@pytest.mark.parametrize("content", ["", "{", "[1]", "[" * 100_000])
def test_a_config_that_is_no_json_ends_in_one_line(tiny, tmp_path, content):
    folder = _saved(tiny("llama"), tmp_path / "model")
    (folder / "config.json").write_text(content)
    for how in BOTH:
        _refused(folder, how, r"config.json (cannot be read as JSON|has no model_type)", error=ConfigError)


@pytest.mark.parametrize("labels", [0, -1, 10**9])
def test_a_head_of_no_or_too_many_labels_is_refused(tiny, tmp_path, labels):
    folder = _saved(tiny("bert"), tmp_path / "model")
    _refused(folder, "split", "has 1..1,000,000 labels", "classification", labels, ConfigError)


def test_an_initializer_range_that_is_no_width_is_refused(tiny, tmp_path):
    folder = _saved(tiny("bert").bert, tmp_path / "model")
    _set(folder, initializer_range=-0.02)
    for how in BOTH:
        _refused(
            folder,
            how,
            "initializer_range must be a number >= 0, got -0.02",
            "classification",
            3,
            ConfigError,
        )


def test_tensors_that_are_not_read_are_named(tiny, tmp_path):
    config = tiny("bert").config
    folder = _saved(hf.BertForMaskedLM(config), tmp_path / "model")
    notes = load_model(str(folder), head="classification", num_labels=3, seed=0).notes
    assert any(
        "stored tensors are no part of BertForSequenceClassification and not read: cls.pred" in n
        for n in notes
    )


@pytest.mark.parametrize("how", BOTH)
def test_a_tensor_stored_under_two_names_is_refused(tiny, tmp_path, how):
    folder = _saved(tiny("gpt2"), tmp_path / "model")
    _rewrite(
        folder, lambda tensors: tensors | {"h.0.ln_1.weight": tensors["transformer.h.0.ln_1.weight"] + 1}
    )
    _refused(folder, how, "transformer.h.0.ln_1.weight is stored twice", error=ModelError)


@pytest.mark.parametrize("how", BOTH)
def test_former_names_of_tensors_are_read_as_transformers_reads_them(tiny, tmp_path, how):
    folder = _saved(tiny("bert"), tmp_path / "model")
    now, then = ("LayerNorm.weight", "LayerNorm.bias"), ("LayerNorm.gamma", "LayerNorm.beta")

    def as_then(tensors):
        former = {key.replace(now[0], then[0]).replace(now[1], then[1]): t for key, t in tensors.items()}
        return former | {"bert.embeddings.position_ids": torch.arange(64)[None]}

    _rewrite(folder, as_then)
    assert sum(key.endswith(then) for key in _tensors(folder)) == 14
    plain = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    _same(_read(folder, how, "classification", 5), plain.state_dict())
    assert load_model(str(folder), head="classification", num_labels=5, seed=0).notes == ()


def _check_buffers(model, folder, dtype):
    """Those of the whole model and of both halves are those of plain transformers."""
    model.save_pretrained(folder / "model")
    expected = dict(type(model).from_pretrained(folder / "model", dtype=dtype).named_buffers())
    whole = load_model(str(folder / "model"), head=_head(model), num_labels=5, seed=0, dtype=dtype).model
    split_folder(folder / "model", 1, folder / "halves", head=_head(model), num_labels=5)
    halves = [load_half(folder / "halves" / side, dtype).model for side in ("client", "server")]
    for part in (whole, *halves):
        for key, buffer in part.named_buffers():
            assert buffer.dtype == expected[key].dtype, key
            assert torch.equal(buffer, expected[key]), key
    assert dict(whole.named_buffers()).keys() == expected.keys()
    return expected


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_buffers_are_those_of_transformers_in_every_dtype(model_name, tiny, tmp_path, stored, dtype):
    _check_buffers(tiny(model_name).to(stored), tmp_path, dtype)


_ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16},
}


def _with_rope(model, kind):
    rope = {"rope_type": kind, "rope_theta": 1e4} | _ROPES[kind]
    return type(model)(type(model.config).from_dict(model.config.to_diff_dict() | {"rope_parameters": rope}))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", _ROPES)
def test_rotary_frequencies_of_every_kind_are_those_of_transformers(tiny, tmp_path, kind, stored):
    _check_buffers(_with_rope(tiny("llama"), kind).to(stored), tmp_path, torch.float32)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_joined_halves_of_a_half_precision_checkpoint_compute_as_transformers(
    tiny, padded, tmp_path, name, stored, dtype
):
    """Width 40: its root, Gemma's scale of the embeddings, is no bfloat16."""
    sizes = tiny(name).config.to_diff_dict() | {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 10}
    model = type(tiny(name))(type(tiny(name).config).from_dict(sizes))
    folder = _saved(model.to(stored), tmp_path / "model")
    plain = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    split_folder(folder, 1, tmp_path / "halves")
    client, server = (load_half(tmp_path / "halves" / side, dtype) for side in ("client", "server"))
    ids, mask = padded("left")
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(server(client(ids, mask), mask), expected)
        later = [load_half(tmp_path / "halves" / side).convert(dtype) for side in ("client", "server")]
        assert torch.equal(later[1](later[0](ids, mask), mask), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_is_the_same_bits_in_train_and_join(tiny, tmp_path, dtype):
    """50,000 labels: by float64 at once and by way of float32 some bfloat16 weights would differ."""
    folder = _saved(tiny("bert").bert, tmp_path / "model")
    whole = _read(folder, "train", "classification", 50_000, dtype)
    _same(_read(folder, "split", "classification", 50_000, dtype), whole)


_EVIL = """
from pathlib import Path
Path({!r}).write_text("executed")
from transformers import LlamaConfig, LlamaForCausalLM
class Evil(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
"""


@pytest.mark.parametrize("how", BOTH)
@pytest.mark.parametrize("model_type", ["frobnicator", "t5", "llama"])
def test_code_of_a_model_folder_is_not_executed_nor_asked_about(tiny, tmp_path, monkeypatch, how, model_type):
    folder, marker = _saved(tiny("llama"), tmp_path / "model"), tmp_path / "written"
    (folder / "evil.py").write_text(_EVIL.format(str(marker)))
    _set(folder, model_type=model_type, auto_map={
        "AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Model", "AutoModel": "evil.Model",
        "AutoTokenizer": ["evil.Evil", None],
    })  # fmt: skip
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "y")
    if model_type == "llama":  # transformers has the class itself
        _same(_read(folder, how), tiny("llama").state_dict())
    else:
        with pytest.raises(SplitError):
            _read(folder, how)
    assert not marker.exists()
    assert not asked
