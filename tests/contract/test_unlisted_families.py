"""A family without a row: cut by its structure if its halves are then the whole, else refused with the reason."""

import json

import pytest
import torch
import transformers as hf

from hosl.errors import ConfigError, SplitError
from hosl.parties.clients.guided import GuidedClient
from hosl.planner.model_shape import model_shape
from hosl.split import LoraSpec, add_lora, export_checkpoint, load_half, load_model, split_folder, split_model
from hosl.split.families import FAMILIES
from hosl.split.structure import _by_structure, family_for

_SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
WORK = {
    "granitemoe": (
        hf.GraniteMoeForCausalLM,
        hf.GraniteMoeConfig,
        _SIZES | {"embedding_multiplier": 6.0, "num_local_experts": 4},
    ),
    "helium": (hf.HeliumForCausalLM, hf.HeliumConfig, _SIZES | {"head_dim": 8}),
    "rembert": (
        hf.RemBertForSequenceClassification,
        hf.RemBertConfig,
        _SIZES | {"input_embedding_size": 16, "num_labels": 5},
    ),
    "persimmon": (hf.PersimmonForSequenceClassification, hf.PersimmonConfig, _SIZES | {"num_labels": 5}),
}


def _build(name):
    model_class, config_class, settings = WORK[name]
    config = config_class(**{k: v for k, v in settings.items() if hasattr(config_class(), k)})
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return model


def _whole(model, ids, mask):
    options = {"use_cache": False} if family_for(model).is_decoder else {}
    return model(input_ids=ids, attention_mask=mask, **options).logits


@pytest.mark.parametrize("name", WORK)
def test_a_family_without_a_row_works_where_its_structure_allows(name, padded, tmp_path):
    model = _build(name)
    head = "causal" if hasattr(model, "lm_head") else "classification"
    assert (model.config.model_type, head) not in FAMILIES
    model.save_pretrained(tmp_path / "whole")
    loaded = load_model(str(tmp_path / "whole"), head=head, num_labels=5, seed=0)
    (note,) = loaded.notes
    assert f"{name} has no row in hosl/split/families; cut by its structure: blocks " in note
    assert (
        split_folder(tmp_path / "whole", 1, tmp_path / "split", head=head, num_labels=5).notes == loaded.notes
    )
    halves = [load_half(tmp_path / "split" / side) for side in ("client", "server")]
    export_checkpoint(*halves, tmp_path / "out")
    exported = type(model).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        for side in ("none", "left", "right"):
            ids, mask = padded(side)
            whole = _whole(model, ids, mask)
            for cut in range(4):
                client, server = split_model(loaded.model, cut)
                assert torch.equal(server(client(ids, mask), mask), whole), (side, cut)
            assert torch.equal(halves[1](halves[0](ids, mask), mask), whole)
            assert torch.equal(_whole(exported, ids, mask), whole)


def test_a_plan_takes_it_too(tmp_path):
    _build("helium").config.save_pretrained(tmp_path)
    client, server = model_shape(str(tmp_path)).of_blocks(2).halves(1)
    assert client.blocks_name == server.blocks_name == "model.layers"


def test_what_needs_a_row_says_so():
    """Layers by name: LoRA's default, and the methods that move writers and queries."""
    client, _ = split_model(_build("helium"), 1)
    with pytest.raises(
        ConfigError, match=r"neither peft nor hosl has a default for helium; name the modules"
    ):
        add_lora(client, LoraSpec(), seed=1)
    add_lora(client, LoraSpec(target_modules=("q_proj",)), seed=1)
    with pytest.raises(
        SplitError, match=r"this method moves the layers .*, which hosl does not know of helium"
    ):
        GuidedClient(split_model(_build("helium"), 1)[0])


def test_a_family_whose_halves_are_not_the_whole_is_refused_with_the_first_difference(tmp_path):
    """XGLM adds sinusoids for positions, which have no weights: what shows the side of a module is missing."""
    config = hf.XGLMConfig(vocab_size=97, d_model=32, ffn_dim=64, num_layers=3, attention_heads=4)
    model = hf.XGLMForCausalLM(config).eval()
    with pytest.raises(
        SplitError,
        match=r"XGLMForCausalLM \(model_type 'xglm'\): no such family.* write a row .*hosl/split/families"
        r".*By its structure it cannot be cut either: its halves are not the whole at cut 0 with no padding",
    ):
        split_model(model, 1)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"model_type xglm cannot be cut: .*its halves are not the whole at cut 0"
    ):
        model_shape(str(tmp_path))


@pytest.mark.parametrize(
    ("model_class", "config", "reason"),
    [
        (hf.BartForCausalLM, hf.BartConfig(d_model=32, decoder_layers=2, encoder_layers=3), "one list of 3 blocks"),
        (hf.AlbertForSequenceClassification, hf.AlbertConfig(hidden_size=64), "one list of 3 blocks, found none"),
        (hf.XLNetLMHeadModel, hf.XLNetConfig(d_model=32, n_layer=3, n_head=4), "itself has a weight, mask_emb"),
        (hf.BertForTokenClassification, hf.BertConfig(), "its head is neither a language model's nor a classifier's"),
    ],
    ids=["two stacks", "one block many times", "a loose weight", "another head"],
)  # fmt: skip
def test_another_structure_is_refused_with_what_stands_in_the_way(model_class, config, reason):
    config.num_hidden_layers = 3
    with torch.device("meta"):
        model = model_class(config)
    with pytest.raises(SplitError, match=reason):
        family_for(model)


def test_a_model_too_large_to_be_looked_at_is_refused(monkeypatch):
    monkeypatch.setattr("hosl.split.structure._MOST_WEIGHTS", 1000)
    found, reason = _by_structure(
        hf.OlmoeForCausalLM, json.dumps(hf.OlmoeConfig(num_hidden_layers=2).to_dict())
    )
    assert found is None
    assert "of its blocks have" in reason
    assert "weights, more than 1,000" in reason


def test_looking_leaves_the_global_random_state_alone():
    model = _build("helium")
    _by_structure.cache_clear()
    before = torch.random.get_rng_state()
    assert family_for(model).guessed
    assert torch.equal(torch.random.get_rng_state(), before)
