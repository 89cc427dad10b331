"""Every family takes adapters on both halves; the oracle is peft on the whole model."""

from copy import deepcopy

import peft
import pytest
import torch

from hosl.split import LoraSpec, add_lora, export_adapter, split_model


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


@pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`:FutureWarning")
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
