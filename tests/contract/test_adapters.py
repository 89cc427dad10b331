"""Every family takes adapters on both halves; the oracle is peft on the whole model."""

from copy import deepcopy

import peft
import pytest
import torch
import transformers as hf

from hosl.config import parse_config
from hosl.errors import ConfigError
from hosl.methods.torch_parties import make_server
from hosl.split import LoraSpec, add_lora, export_adapter, load_model, split_model


def _targets(half):
    """The linear layers of the first block, by the last part of their names."""
    inside = f"{half.blocks_name}.0."
    linear = {
        name.rpartition(".")[2]
        for name, module in half.model.named_modules()
        if name.startswith(inside) and getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
    }
    return tuple(sorted(linear))


def _logits(output):
    return output.logits if hasattr(output, "logits") else output


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_two_adapted_halves_equal_peft_on_the_whole(tiny, model_name, padded, tmp_path):
    model = tiny(model_name)
    whole = deepcopy(model)
    ids, mask = padded("right")
    client_half, server_half = split_model(model, 1)
    spec = LoraSpec(r=3, alpha=6, target_modules=_targets(client_half))
    with torch.no_grad():
        before = whole(input_ids=ids, attention_mask=mask).logits
        for half in (client_half, server_half):
            add_lora(half, spec, seed=1)
        assert torch.equal(server_half(client_half(ids, mask), mask), before)
        generator = torch.Generator().manual_seed(2)
        for half in (client_half, server_half):
            trained = [p for p in half.parameters() if p.requires_grad]
            assert trained
            for p in trained:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
        halves = server_half(client_half(ids, mask), mask)
        export_adapter(client_half, server_half, tmp_path / "adapter")
        adapted = peft.PeftModel.from_pretrained(whole, str(tmp_path / "adapter")).eval()
        expected = adapted(input_ids=ids, attention_mask=mask).logits
    assert not torch.allclose(expected, before, atol=1e-3)
    torch.testing.assert_close(halves, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def offline(monkeypatch):
    """No look at the hub for a tokenizer beside the adapter."""
    monkeypatch.setattr(peft.auto, "check_file_exists_on_hf_hub", lambda **_: False)


def _trained_by_lora(folder, model_name, labels):
    """Two halves with adapters of different ranks, a new head where the labels are others; all drawn, as trained."""
    head = "causal" if labels is None else "classification"
    loaded = load_model(str(folder), head=head, num_labels=labels, seed=3)
    client_half, server_half = split_model(loaded.model, 1)
    targets = _targets(client_half)
    add_lora(client_half, LoraSpec(r=2, alpha=6, target_modules=targets), seed=1)
    add_lora(server_half, LoraSpec(r=4, alpha=4, target_modules=targets[:2]), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for half in (client_half, server_half):
            for name, p in half.named_parameters():
                if name in loaded.initialised:
                    p.requires_grad_(True)
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=generator) * 0.3)
    return client_half, server_half


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("labels", [5, 7], ids=["the same labels", "other labels"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_autopeft_loads_a_classifiers_adapter_with_its_trained_head(
    tiny, padded, offline, tmp_path, name, labels
):
    tiny(name).save_pretrained(tmp_path / "base")
    ids, mask = padded("right")
    client_half, server_half = _trained_by_lora(tmp_path / "base", name, labels)
    export_adapter(client_half, server_half, tmp_path / "adapter", base=str(tmp_path / "base"))
    with torch.no_grad():
        trained = server_half(client_half(ids, mask), mask)
        adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", num_labels=labels, ignore_mismatched_sizes=True
        ).eval()
        torch.testing.assert_close(adapted(input_ids=ids, attention_mask=mask).logits, trained)
        plain = hf.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=labels, ignore_mismatched_sizes=True
        ).eval()
        assert not torch.allclose(plain(input_ids=ids, attention_mask=mask).logits, trained, atol=0.1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_autopeft_loads_a_language_models_adapter(tiny, padded, offline, tmp_path, name):
    tiny(name).save_pretrained(tmp_path / "base")
    ids, mask = padded("right")
    client_half, server_half = _trained_by_lora(tmp_path / "base", name, None)
    export_adapter(client_half, server_half, tmp_path / "adapter", base=str(tmp_path / "base"))
    with torch.no_grad():
        trained = server_half(client_half(ids, mask), mask)
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        torch.testing.assert_close(
            adapted(input_ids=ids, attention_mask=mask).logits, trained, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "which", ["classifier.weight", "bert.encoder.layer.2.output.dense.weight", "bert.pooler"]
)
def test_an_adapter_beside_trained_weights_that_it_cannot_hold_is_not_written(tiny, tmp_path, which):
    """The head goes with the adapter; a block's own weight, or a half that was trained whole, does not."""
    client_half, server_half = split_model(tiny("bert"), 1)
    add_lora(client_half, LoraSpec(target_modules=("query",)), seed=1)
    add_lora(server_half, LoraSpec(target_modules=("query",)), seed=1)
    for name, p in server_half.named_parameters():
        if name.startswith(which):
            p.requires_grad_(True)
    if "encoder" not in which:
        export_adapter(client_half, server_half, tmp_path / "adapter")
        return
    with pytest.raises(ConfigError, match=f"1 weights beside the adapters were trained, such as {which}"):
        export_adapter(client_half, server_half, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_a_stored_head_is_trained_beside_adapters_as_peft_does(tiny, name, cut):
    """It stayed frozen, and with all blocks at the client the server had nothing to train."""
    model = tiny(name)
    adapted = ["q_lin" if name == "distilbert" else "query"]
    settings = {"trainable": "lora", "lora": {"target_modules": adapted}}
    config = parse_config({"method": "fo-fo", "server": settings}, where="here")
    server = make_server(config, split_model(deepcopy(model), cut)[1], ())
    mine = {n for n, p in server.half.named_parameters() if p.requires_grad and "lora" not in n}
    theirs = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=adapted))
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad and "lora" not in n}
    assert mine == {
        n.partition("base_model.model.")[2].replace("modules_to_save.default.", "") for n in trained
    }


@pytest.mark.parametrize("name", ["q_proj,v_proj", "[q_proj]", "q_proj v_proj", ""])
def test_what_is_no_name_of_a_module_is_refused_with_how_to_write_it(name):
    with pytest.raises(ConfigError, match=r"--client\.lora\.target-modules q_proj v_proj"):
        LoraSpec(target_modules=("o_proj", name))
