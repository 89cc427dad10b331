"""What a step of the guided methods takes: a half as wide as it takes for activations to count."""

import numpy as np
import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from hosl.core.rounds import StepInputs, hosl_node_round, hosl_residual_slopes_round
from hosl.core.targets import Batch, ClassTargets
from hosl.parties.clients.guided import GuidedClient
from hosl.parties.clients.node import NodeClient
from hosl.parties.engine.memory import TorchMemory, resident_bytes
from hosl.split import split_model
from tests.numerics.test_guided import _gradient, _Linear


@pytest.mark.parametrize(
    ("kind", "method_round", "probes"),
    [(GuidedClient, hosl_residual_slopes_round, {}), (NodeClient, hosl_node_round, {"seeds": [1, 2, 3]})],
    ids=["hosl-guided", "hosl-node"],
)
def test_a_step_takes_little_more_memory_than_a_forward_pass(kind, method_round, probes):
    config = OPTConfig(
        vocab_size=500, hidden_size=128, ffn_dim=512, num_attention_heads=4, num_hidden_layers=5,
        max_position_embeddings=64, word_embed_proj_dim=128,
    )  # fmt: skip
    half, _ = split_model(OPTForCausalLM(config), 5)
    client = kind(half)
    ids = np.random.Generator(np.random.Philox(0)).integers(3, 500, (8, 32))
    batch = Batch(ids, ClassTargets(np.ones(ids.shape, np.int8), np.zeros(8, np.int64)))
    held = resident_bytes([*client.half.model.parameters(), *client.half.model.buffers()])
    server = _Linear(_gradient(client, batch))
    forward, step = TorchMemory(held), TorchMemory(held)
    forward.watch(client.forward, batch)
    inputs = StepInputs(1, epsilon=1e-3, learning_rate=0.3, **probes)
    step.watch(method_round, client, server, batch, inputs)
    assert step.peak_bytes <= 1.10 * forward.peak_bytes


@pytest.mark.parametrize(
    ("kind", "method_round", "probes"),
    [(GuidedClient, hosl_residual_slopes_round, {}), (NodeClient, hosl_node_round, {"seeds": [1, 2, 3]})],
    ids=["hosl-guided", "hosl-node"],
)
def test_a_large_batch_goes_forward_in_parts_and_moves_the_weights_as_a_whole(
    tiny, monkeypatch, kind, method_round, probes
):
    ids = np.random.Generator(np.random.Philox(0)).integers(3, 90, (9, 8))
    batch = Batch(ids, ClassTargets(np.ones(ids.shape, np.int8), np.zeros(9, np.int64)))
    moved = []
    for tokens in (8 * 4, 8 * 64):  # four rows at once, or all
        monkeypatch.setattr("hosl.parties.micro_batches.TOKENS_AT_ONCE", tokens)
        half, _ = split_model(tiny("opt", torch.float64), 3)
        client = kind(half)
        server = _Linear(_gradient(client, batch))
        assert len(client._slices(torch.from_numpy(ids))) == (3 if tokens == 32 else 1)
        h = client.forward_keeping_inputs(batch)
        assert torch.equal(h, client.forward(batch))
        method_round(client, server, batch, StepInputs(1, epsilon=1e-3, learning_rate=0.3, **probes))
        moved.append({name: p.detach().clone() for name, p in client.trained.items()})
    for name in moved[0]:
        torch.testing.assert_close(moved[0][name], moved[1][name], rtol=1e-8, atol=1e-11)
