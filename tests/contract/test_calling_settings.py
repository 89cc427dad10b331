"""Settings of a config.json about how a model is called: they change neither a half's numbers nor an export's."""

import json

import pytest
import torch
import transformers as hf

from hosl.split import export_checkpoint, load_half, load_model, split_folder, split_model, split_u_shape

_ASKED = {
    "tuples": {"return_dict": False},
    "chunks that do not divide a row": {"chunk_size_feed_forward": 4},
    "attentions": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
    "a cache": {"is_decoder": True, "use_cache": True},
}
_ASKED["all of them"] = {key: value for asked in _ASKED.values() for key, value in asked.items()}
_SET_ASIDE = ("return_dict", "chunk_size_feed_forward")


def _config(folder):
    return json.loads((folder / "config.json").read_text())


def _logits(folder, head, ids, mask):
    """What plain transformers computes from a model's folder."""
    kinds = {"causal": hf.AutoModelForCausalLM, "classification": hf.AutoModelForSequenceClassification}
    with torch.no_grad():
        return kinds[head].from_pretrained(folder).eval()(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("asked", _ASKED)
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "gpt2", "llama", "opt"])
def test_a_config_that_asks_for_tuples_chunks_attentions_or_caches_trains_and_exports_the_same_model(
    tiny, padded, tmp_path, name, asked
):
    model, (ids, mask) = tiny(name), padded("right")
    head = "causal" if hasattr(model, "lm_head") else "classification"
    settings = _ASKED[asked]
    model.save_pretrained(tmp_path / "plain")
    if "is_decoder" in settings:  # which changes what is computed: a BERT's rows are then read from the left
        (tmp_path / "plain" / "config.json").write_text(
            json.dumps(_config(tmp_path / "plain") | {"is_decoder": True})
        )
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(_config(tmp_path / "model") | settings))
    expected = _logits(tmp_path / "plain", head, ids, mask)

    loaded = load_model(str(tmp_path / "model"), head=head, num_labels=5, seed=0)
    split_folder(tmp_path / "model", 1, tmp_path / "halves", head=head, num_labels=5)
    halves = split_model(loaded.model, 1)
    stored = [load_half(tmp_path / "halves" / side) for side in ("client", "server")]
    first, trunk, last = split_u_shape(loaded.model, 1)
    scored = torch.arange(ids.shape[1]) if head == "causal" else torch.tensor([0])
    with torch.no_grad():
        for client, server in (halves, stored):
            assert torch.equal(server(client(ids, mask), mask), expected)
        assert torch.equal(last(trunk(first(ids, mask), mask, scored)), expected)
    for way, (client, server) in (("train", halves), ("split", stored)):
        export_checkpoint(client, server, tmp_path / way)
        assert torch.equal(_logits(tmp_path / way, head, ids, mask), expected)
        kept = {key: value for key, value in settings.items() if key not in _SET_ASIDE}
        if name == "distilbert":
            kept.pop("use_cache", None)  # it has no such setting, and transformers drops it
        assert _config(tmp_path / way).items() >= kept.items()
    said = [note for note in loaded.notes if "set aside" in note]
    assert len(said) == any(key in settings for key in _SET_ASIDE)
    assert all(key in said[0] for key in _SET_ASIDE if key in settings)
