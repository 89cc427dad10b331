"""The mean over scored tokens, as causal language models are trained: transformers' own loss is the oracle."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hosl.core.rounds import StepInputs, fo_round
from hosl.core.targets import Batch, OptionTargets, weight_of
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.engine.loss import mean_loss, row_scores, wanted_positions
from hosl.parties.remote import torch_wire
from hosl.parties.remote.local_trunk import LocalTrunk
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.headed import HeadedServer
from hosl.parties.servers.synchronous import SynchronousServer
from hosl.parties.servers.trunk import TrunkServer
from hosl.split import split_model, split_u_shape


def _scored_batch(ids, mask, seed=0):
    """A batch whose scored tokens are scattered over the row, and the labels that transformers takes for the same."""
    generator = torch.Generator().manual_seed(seed)
    scored = (torch.rand(ids.shape, generator=generator) < 0.5) & (mask == 1)
    scored[:, 1:] &= mask[:, :-1] == 1  # a token is predicted at the position before it
    scored[:, 0] = False
    labels = torch.where(scored, ids, -100)
    span = int(scored.sum(1).max())
    positions, tokens = np.zeros((len(ids), span), np.int32), np.full((len(ids), span), -1, np.int32)
    for row in range(len(ids)):
        places = scored[row].nonzero()[:, 0].numpy()
        positions[row, : len(places)], tokens[row, : len(places)] = places - 1, ids[row, places]
    targets = OptionTargets(mask.numpy().astype(np.int8), positions, tokens, "tokens")
    return Batch(ids.numpy(), targets), labels


def _exact(model, ids, mask, labels, **places):
    """The shifted cross-entropy of the whole model's logits; transformers' loss agrees, but only to float32."""
    whole = model(input_ids=ids, attention_mask=mask, labels=labels, **places)
    loss = F.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
    return loss


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "gemma3"])
def test_the_loss_of_a_step_and_its_gradients_are_those_of_transformers(tiny, padded, family, side):
    model = tiny(family, torch.float64)
    ids, mask = padded(side)
    batch, labels = _scored_batch(ids, mask)
    reference = deepcopy(model)
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if family == "gpt2" else {}
    expected = _exact(reference, ids, mask, labels, **places)
    expected.backward()
    gradients = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    client_half, server_half = split_model(model, 1)
    server = FirstOrderServer(server_half, learning_rate=lambda step: 1.0)
    reply = fo_round(FirstOrderClient(client_half), server, batch, StepInputs(1, learning_rate=1.0))
    assert reply.loss == pytest.approx(expected.item(), rel=1e-12)
    moved = dict(client_half.named_parameters()) | dict(server_half.named_parameters())
    blocks = client_half.blocks_name
    compared = [name for name in gradients if name.startswith(blocks)]  # a tied head is two tensors here
    assert compared
    for name in compared:
        torch.testing.assert_close(before[name] - moved[name], gradients[name], rtol=1e-8, atol=1e-12)


def test_the_scores_of_rows_add_up_to_the_loss_and_count_the_tokens_ranked_first(tiny, padded):
    model = tiny("llama")
    ids, mask = padded("left")
    batch, labels = _scored_batch(ids, mask)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, labels=labels)
    logits = whole.logits[:, wanted_positions(batch.targets)]
    scores = row_scores(logits, batch.targets)
    tokens = (batch.targets.tokens >= 0).sum(1)
    assert float(-(scores[:, 0] * tokens).sum() / tokens.sum()) == pytest.approx(float(whole.loss), rel=1e-6)
    assert float(mean_loss(logits, batch.targets)) == pytest.approx(float(whole.loss), rel=1e-6)
    ranked_first = whole.logits[:, :-1].argmax(-1) == labels[:, 1:]
    assert scores[:, 1].tolist() == ranked_first.sum(1).tolist()
    assert weight_of(batch.targets) == int((labels != -100).sum())


def test_devices_with_unequal_numbers_of_tokens_make_the_step_of_one_batch(tiny, padded):
    """The step of a synchronous round: every token weighs the same, whichever device it is on."""
    model, (ids, mask) = tiny("gpt_neox", torch.float64), padded("left")
    batch, _ = _scored_batch(ids, mask)
    parts = [
        Batch(
            batch.input_ids[rows],
            OptionTargets(*(getattr(batch.targets, n)[rows] for n in ("mask", "positions", "tokens")), "tokens"),
        )
        for rows in (slice(0, 1), slice(1, 3))
    ]  # fmt: skip
    assert len({weight_of(part.targets) for part in parts}) == 2
    client_half, server_half = split_model(deepcopy(model), 1)
    whole = FirstOrderServer(server_half, learning_rate=lambda step: 1.0)
    whole.step(FrozenClient(client_half).forward(batch), batch.targets, step=1)
    client_half, shared_half = split_model(deepcopy(model), 1)
    shared = SynchronousServer(shared_half, learning_rate=lambda step: 1.0)
    for part in parts:
        h = FrozenClient(client_half).forward(part)
        shared.contribute(h, part.targets, weight_of(part.targets))
    shared.apply(1)
    for (name, p), (_, other) in zip(
        server_half.named_parameters(), shared_half.named_parameters(), strict=True
    ):
        torch.testing.assert_close(p, other, rtol=1e-9, atol=1e-12, msg=name)


def test_a_head_on_the_device_takes_the_same_mean(tiny, padded):
    model, (ids, mask) = tiny("gpt_neox", torch.float64), padded("left")
    batch, labels = _scored_batch(ids, mask)
    with torch.no_grad():
        expected = _exact(model, ids, mask, labels).item()
    client_half, trunk, head = split_u_shape(model, 1)
    headed = HeadedServer(
        LocalTrunk(TrunkServer(trunk, learning_rate=lambda step: 0.1), torch_wire),
        head,
        learning_rate=lambda step: 0.1,
    )
    h = FrozenClient(client_half).forward(batch)
    assert headed.losses([h], batch.targets) == pytest.approx([expected], rel=1e-12)
    assert headed.step(h, batch.targets, step=1).loss == pytest.approx(expected, rel=1e-12)
