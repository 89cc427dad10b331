"""The export of a model whose head is its embedding: one tensor while both copies are equal, else as one asks."""

import pytest
import torch
import transformers as hf

from hosl.errors import ConfigError
from hosl.split import export_checkpoint, split_model

TIED = ("opt", "gpt2", "gemma2", "gemma3")


def _halves(tiny, name, train_head):
    client_half, server_half = split_model(tiny(name), 1)
    head = server_half.model.get_output_embeddings().weight
    with torch.no_grad():
        if train_head:
            head.add_(torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return client_half, server_half, head


def _bytes(folder):
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_is_exported_no_larger_while_its_two_copies_are_equal(tiny, tmp_path, name):
    tiny(name).save_pretrained(tmp_path / "base")
    client_half, server_half, _ = _halves(tiny, name, train_head=False)
    assert export_checkpoint(client_half, server_half, tmp_path / "out") == 0
    assert _bytes(tmp_path / "out") == pytest.approx(
        _bytes(tmp_path / "base"), abs=100
    )  # the header's spaces
    assert hf.AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings


@pytest.mark.parametrize("name", TIED)
def test_a_tied_model_whose_head_was_trained_grows_by_it_or_keeps_the_copy_that_is_asked_for(
    tiny, padded, tmp_path, name
):
    ids, mask = padded("right")
    client_half, server_half, head = _halves(tiny, name, train_head=True)
    grown = export_checkpoint(client_half, server_half, tmp_path / "two")
    assert grown == head.nbytes
    whole = {}
    for tie in ("embedding", "head"):
        assert export_checkpoint(client_half, server_half, tmp_path / tie, tie=tie) == 0
        assert _bytes(tmp_path / "two") - _bytes(tmp_path / tie) >= grown
        whole[tie] = hf.AutoModelForCausalLM.from_pretrained(tmp_path / tie).eval()
        assert whole[tie].get_output_embeddings().weight is whole[tie].get_input_embeddings().weight
    untied = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(untied.get_output_embeddings().weight, head)
    embedding = untied.get_input_embeddings().weight.detach().clone()
    assert torch.equal(embedding, tiny(name).get_input_embeddings().weight)
    with torch.no_grad():
        for tie, tensor in (("embedding", embedding), ("head", head)):
            untied.get_output_embeddings().weight.copy_(tensor)
            untied.get_input_embeddings().weight.copy_(tensor)
            expected = untied(input_ids=ids, attention_mask=mask).logits
            torch.testing.assert_close(whole[tie](input_ids=ids, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt_neox"])
def test_a_model_that_is_not_tied_cannot_be_tied(tiny, tmp_path, name):
    client_half, server_half = split_model(tiny(name), 1)
    with pytest.raises(ConfigError, match="the head of this model is not tied to its embeddings"):
        export_checkpoint(client_half, server_half, tmp_path / "out", tie="head")
    assert not (tmp_path / "out").exists()
