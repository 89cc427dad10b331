"""What a folder holds beside what is cut: a text model inside another, a classifier's new head, experts one by one."""

import json

import pytest
import safetensors.torch
import torch
import transformers as hf

from hosl.errors import ModelError, SplitError
from hosl.planner.model_shape import model_shape
from hosl.split import export_checkpoint, load_half, load_model, split_folder, split_model, split_u_shape
from tests.conftest import build
from tests.families import MORE_MODELS

_TEXT = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8}
_TEXT |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 5,
}
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION |= {"image_size": 28, "patch_size": 14}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A multimodal checkpoint as transformers saves it, and what it gives for text alone."""
    config = hf.Gemma3Config(
        text_config=_TEXT, vision_config=_VISION, mm_tokens_per_image=4, image_token_index=96
    )
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    folder = tmp_path_factory.mktemp("gemma3")
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("names", ["as saved", "of today"])
def test_the_text_model_of_a_multimodal_checkpoint_is_read_and_the_rest_is_named(
    gemma3, padded, tmp_path, names
):
    folder, model = gemma3
    if names == "of today":
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text((folder / "config.json").read_text())
        tensors = {name: t.clone() for name, t in model.state_dict().items() if name != "lm_head.weight"}
        safetensors.torch.save_file(tensors, tmp_path / "model" / "model.safetensors")
        folder = tmp_path / "model"
    loaded = load_model(str(folder), head="causal", num_labels=None, seed=0)
    assert type(loaded.model) is hf.Gemma3ForCausalLM
    (note,) = loaded.notes
    assert note.startswith(
        "only the text model of this checkpoint is read; left out: multi_modal_projector, vision_tower ("
    )
    info = split_folder(folder, 2, tmp_path / "out")
    assert (info.family, info.notes) == ("gemma3_text", loaded.notes)
    client, server = (load_half(tmp_path / "out" / side) for side in ("client", "server"))
    export_checkpoint(client, server, tmp_path / "text")
    exported = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "text").eval()
    assert type(exported) is hf.Gemma3ForCausalLM
    with torch.no_grad():
        for side in ("left", "right"):
            ids, mask = padded(side)
            ids = ids.clamp(max=95)
            whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            assert torch.equal(server(client(ids, mask), mask), whole)
            assert torch.equal(exported(input_ids=ids, attention_mask=mask, use_cache=False).logits, whole)
    assert model_shape(str(folder)).blocks == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "qwen3_moe"])
def test_a_language_model_becomes_a_classifier_with_a_new_score_and_nothing_else(padded, tmp_path, name):
    build(name).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), head="classification", num_labels=7, seed=3)
    again = load_model(str(tmp_path), head="classification", num_labels=7, seed=3)
    assert loaded.initialised == ("score.weight",)
    assert torch.equal(loaded.model.score.weight, again.model.score.weight)
    notes = "\n".join(loaded.notes)
    assert "drawn from the seed: score.weight" in notes
    assert ("pad_token_id" in notes) == (name in ("gpt2", "bloom"))
    ids, mask = padded("left")
    ids[mask == 0] = loaded.model.config.pad_token_id
    client, server = split_model(loaded.model, 1)
    export_checkpoint(client, server, tmp_path / "out", labels=list("abcdefg"))
    exported = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        places = (torch.arange(mask.shape[1]) - mask.argmax(-1, keepdim=True)).clamp(min=0)
        options = {"position_ids": places} if name == "gpt2" else {}
        whole = exported(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        torch.testing.assert_close(server(client(ids, mask), mask), whole, rtol=1e-5, atol=1e-6)


def test_a_decoder_without_its_last_norm_is_refused_and_not_filled_from_the_seed(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks model.norm.weight"):
        load_model(str(tmp_path), head="classification", num_labels=2, seed=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_class_is_read_off_the_last_token_that_is_no_padding(padded, side):
    """Whatever stands in the padding, and by the mask alone: the server half never sees an id."""
    model = build("llama (class)")
    client, server = split_model(model, 2)
    ids, mask = padded(side)
    rows = [row[kept == 1] for row, kept in zip(ids, mask, strict=True)]
    with torch.no_grad():
        found = server(client(ids, mask), mask)
        assert torch.equal(found, model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        for row, logits in zip(rows, found, strict=True):
            alone = model(input_ids=row[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
        ids[mask == 0] = 50
        if side == "right":  # what follows is never seen
            assert torch.equal(server(client(ids, mask), mask), found)


def test_an_expert_that_is_missing_or_of_another_shape_is_named(tmp_path):
    build("qwen3_moe").save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    for damage, message in (
        (lambda: tensors.pop(name), r"model.layers.1.mlp.experts.gate_up_proj"),
        (
            lambda: tensors.update({name: torch.zeros(3, 32)}),
            r"parts of model.layers.1.mlp.experts.gate_up_proj",
        ),
    ):
        damage()
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=message):
            load_model(str(tmp_path), head="causal", num_labels=None, seed=0)


def test_a_head_that_averages_over_tokens_cannot_keep_the_labels(padded):
    model_class, config_class, settings = MORE_MODELS["modernbert"]
    model = model_class(config_class(**settings | {"classifier_pooling": "mean"})).eval()
    ids, mask = padded("right")
    client, server = split_model(model, 1)
    with torch.no_grad():
        assert torch.equal(server(client(ids, mask), mask), model(input_ids=ids, attention_mask=mask).logits)
    with pytest.raises(
        SplitError, match=r"labels at the client: .*modernbert averages over all .*leave the labels"
    ):
        split_u_shape(model, 1)


def test_a_convolution_between_blocks_is_named():
    model_class, config_class, settings = MORE_MODELS["deberta-v2"]
    model = model_class(config_class(**settings | {"conv_kernel_size": 3, "conv_act": "gelu"}))
    with pytest.raises(
        SplitError, match=r"deberta-v2: its config adds deberta.encoder.conv, a convolution after"
    ):
        split_model(model, 1)


def test_what_both_halves_read_is_said_before_a_run(tmp_path):
    build("deberta-v2").save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), head="classification", num_labels=5, seed=0)
    (note,) = loaded.notes
    assert note == (
        "both halves have deberta.encoder.rel_embeddings and deberta.encoder.LayerNorm, which stay as they are"
    )


def test_counts_of_blocks_inside_a_multimodal_config_are_checked(gemma3, tmp_path):
    config = json.loads((gemma3[0] / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"num_hidden_layers must lie in 1..1000, got 10000000"):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("starcoder2", "embedding_dropout"),
        ("phi", "embd_pdrop"),
        ("gptj", "embd_pdrop"),
        ("gpt_neo", "embed_dropout"),
    ],
)
def test_dropout_of_the_embeddings_is_the_clients_alone(padded, name, rate):
    model_class, config_class, settings = MORE_MODELS[name]
    model = model_class(config_class(**settings | {rate: 0.5})).eval()
    client, server = split_model(model, 3)
    ids, mask = padded("right")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        h = client(ids, mask)
        assert torch.equal(server.train()(h, mask), server.eval()(h, mask))
        assert not torch.equal(client.train()(ids, mask), h)
