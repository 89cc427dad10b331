"""The published code's defects are what they are said to be, and stay inside their profile."""

import pytest
import torch

from hosl.config import parse_config
from hosl.core.authors_head import authors_head_round
from hosl.core.directions import direction_seed
from hosl.core.rounds import StepInputs
from hosl.errors import ConfigError
from hosl.parties.authors_head import NoisyFirstOrderServer, NoisyZerothOrderClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.split import split_model


@pytest.fixture
def parties(tiny):
    client_half, server_half = split_model(tiny("bert"), 2)
    # all three rows at once, as probe_with_dropout evaluates them: other micro-batches round otherwise on some CPUs
    client = NoisyZerothOrderClient(client_half, distribution="sphere", micro_batch_size=3)
    return client, NoisyFirstOrderServer(server_half, learning_rate=lambda step: 1e-2)


def test_dropout_is_on_in_h_plus_and_off_in_h_minus(parties, class_batch):
    client, _ = parties
    noisy_plus, minus = client.probe_with_dropout(class_batch, 1, 1e-3, dropout_seed=5)
    clean_plus, clean_minus = ZerothOrderClient.probe(client, class_batch, 1, 1e-3)
    assert torch.equal(minus, clean_minus)
    assert not torch.allclose(noisy_plus, clean_plus, atol=1e-3)
    assert torch.equal(noisy_plus, client.probe_with_dropout(class_batch, 1, 1e-3, dropout_seed=5)[0])


def test_the_fence_puts_mode_and_global_random_state_back(parties, class_batch):
    client, server = parties
    before = torch.random.get_rng_state()
    client.probe_with_dropout(class_batch, 1, 1e-3, dropout_seed=5)
    server.loss_with_dropout(client.forward(class_batch), class_batch.targets, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not client.half.model.training
    assert not server.half.model.training


def test_the_client_moves_after_every_pair_and_replays_so(parties, tiny, class_batch):
    client, server = parties
    seeds = [direction_seed(0, 1, q) for q in range(3)]
    authors_head_round(
        client,
        server,
        class_batch,
        StepInputs(1, seeds=seeds, server_seeds=[2], epsilon=1e-3, learning_rate=1e-3),
    )
    assert len(client.journal) == 3
    base, _ = split_model(tiny("bert"), 2)
    again = NoisyZerothOrderClient(base, distribution="sphere")
    again.replay(client.journal)
    assert all(torch.equal(p, client.trained[name]) for name, p in again.trained.items())
    assert [len(update_seeds) for _, update_seeds, _ in client.journal.updates()] == [
        3
    ]  # one step in the journal


def test_settings_that_are_not_the_published_codes_are_refused():
    with pytest.raises(ConfigError, match=r"authors-head wants zo.distribution: sphere, got rademacher"):
        parse_config({"profile": "authors-head", "method": "hosl"}, where="test")
