"""Directions along a layer's own inputs: against numpy's singular vectors and autograd's derivatives."""

import numpy as np
import pytest
import torch

from hosl.core.directions import direction, low_rank_factors
from hosl.parties.clients.activation_guided import ActivationGuidedClient, MixedClient, leading_direction
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.split import set_trainable, split_model
from tests.conftest import BLOCKS
from tests.numerics.slopes import slope
from tests.numerics.test_guided import _batch, _gradient, _weights

EPSILON = 1e-5
FAMILIES = ["bert", "opt", "gpt_neox", "gpt2"]
"""Linear layers, flattened rows, a layer for q, k and v together, and none that is a Linear."""


def _client(model, kind=ActivationGuidedClient):
    half, _ = split_model(model, BLOCKS)
    set_trainable(half, "blocks")
    return kind(half, distribution="rademacher")


def _inputs(client, batch):
    """What every trained linear layer reads, [tokens, in] without padding, by the name of its weight."""
    read, held = {}, torch.from_numpy(batch.targets.mask).bool().flatten()
    hooks = []
    for name, m in client.half.model.named_modules():
        if type(m) is torch.nn.Linear and m.weight.requires_grad:
            hooks.append(
                m.register_forward_pre_hook(lambda m, args, n=name: read.update({f"{n}.weight": args[0]}))
            )
    client.forward(batch)
    for hook in hooks:
        hook.remove()
    return {name: x.reshape(len(held), -1)[held] for name, x in read.items()}


def _direction(client, batch, seed):
    """u by tensor, formed anew: a b^T where there is a b, the low-rank distribution elsewhere."""
    columns = {name: leading_direction(x) for name, x in _inputs(client, batch).items()}
    found = {}
    for name, p in client.trained.items():
        if name in columns:
            a, _ = low_rank_factors(seed, name, tuple(p.shape))
            found[name] = torch.from_numpy(a).to(p.dtype)[:, None] * columns[name]
        else:
            found[name] = torch.from_numpy(direction(seed, name, tuple(p.shape), "low-rank")).to(p.dtype)
    return found


def test_power_iteration_finds_the_leading_singular_vector():
    random = np.random.Generator(np.random.Philox(3))
    x = random.normal(size=(40, 16)) + 2.0 * random.normal(size=16)  # activations have a mean that stands out
    _, _, vectors = np.linalg.svd(x)
    b = leading_direction(torch.from_numpy(x)).numpy()
    assert abs(b @ vectors[0]) == pytest.approx(1.0, abs=1e-3)
    assert np.linalg.norm(b) == pytest.approx(1.0)
    assert not leading_direction(torch.zeros(4, 3)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_the_exact_derivatives_and_the_update_follows_them(tiny, padded, family):
    client, batch = _client(tiny(family, torch.float64)), _batch(padded)
    g, before, seeds = _gradient(client, batch), _weights(client), [8, 21]
    directions = [_direction(client, batch, seed) for seed in seeds]
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    (client.half(ids, mask) * g).sum().backward()
    exact = [sum(float((client.trained[n].grad * u).sum()) for n, u in d.items()) for d in directions]
    for p in client.trained.values():
        p.grad = None

    slopes = [slope(client, batch, seed, EPSILON, g) for seed in seeds]
    assert slopes == pytest.approx(exact, rel=1e-5, abs=1e-6)
    client.descend(1, seeds, slopes, 0.1)
    for name, p in client.half.named_parameters():
        moved = p.detach() - before[name]
        if name in client.trained:
            expected = -0.1 / 2 * sum(c * d[name] for c, d in zip(slopes, directions, strict=True))
            torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-12)
        else:
            assert not moved.any()


def test_directions_follow_the_weights_and_the_batch(tiny, padded):
    """After an update, and for another batch, the inputs are looked at again."""
    client = _client(tiny("bert", torch.float64))
    g = _gradient(client, _batch(padded))
    for batch in (_batch(padded), _batch(padded, width=9)):
        g = _gradient(client, batch)
        for step in (1, 2):
            pair = client.probe(batch, 5, EPSILON)
            expected = _direction(client, batch, 5)
            with torch.no_grad():
                for n, u in expected.items():
                    client.trained[n].add_(u, alpha=EPSILON)
                h_plus = client.forward(batch)
                for n, u in expected.items():
                    client.trained[n].sub_(u, alpha=EPSILON)
            torch.testing.assert_close(pair[0], h_plus, rtol=1e-10, atol=1e-12)
            client.descend(step, [5], [slope(client, batch, 5, EPSILON, g)], 1.0)


def test_mixed_directions_are_guided_by_the_seeds_coin(tiny, padded):
    mixed, guided = _client(tiny("bert", torch.float64), MixedClient), _client(tiny("bert", torch.float64))
    plain = _client(tiny("bert", torch.float64), ZerothOrderClient)
    batch, g = _batch(padded), _gradient(guided, _batch(padded))
    for seed, like in ((4, guided), (7, plain)):
        found, expected = (client.probe(batch, seed, EPSILON) for client in (mixed, like))
        assert torch.equal(found[0], expected[0])
    slopes = [slope(mixed, batch, seed, EPSILON, g) for seed in (4, 7)]
    mixed.descend(1, [4, 7], slopes, 0.1)
    guided.probe(batch, 4, EPSILON)
    guided.descend(1, [4], slopes[:1], 0.05)
    plain.descend(1, [7], slopes[1:], 0.05)
    base = _weights(_client(tiny("bert", torch.float64)))
    for (name, m), a, b in zip(
        _weights(mixed).items(), _weights(guided).values(), _weights(plain).values(), strict=True
    ):
        torch.testing.assert_close(m - base[name], (a - base[name]) + (b - base[name]), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_are_only_read_by_probes(tiny, padded, dtype):
    client, batch = _client(tiny("bert", dtype), MixedClient), _batch(padded)
    before = _weights(client)
    for seed in (2, 3):
        client.probe(batch, seed, 1e-2)
    assert all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())
    client.descend(1, [2, 3], [1.0, -1.0], 1e-1)
    assert not all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())
