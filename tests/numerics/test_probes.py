"""Probes against someone else: two forwards with the weights written, exact derivatives, the weights' own bits."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp

from hosl.core.directions import direction
from hosl.parties.probing import Probe, paired, trained_parameters
from hosl.parties.torch_client import ZerothOrderClient
from hosl.parties.torch_server import FirstOrderServer
from hosl.split import split_model

_PROBE = Probe(seed=3, epsilon=1e-3, law="gaussian")


def _bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _written(half, seed, scale, law):
    """The half's weights at theta + scale u, written out."""
    with torch.no_grad():
        for name, p in half.named_parameters():
            p.add_(torch.from_numpy(direction(seed, name, tuple(p.shape), law)), alpha=scale)


@pytest.mark.parametrize("law", ["gaussian", "rademacher", "sphere"])
def test_a_probe_equals_two_forwards_with_the_weights_written(model_name, tiny, padded, law):
    """Every family, every weight trained, embeddings too. float64: only the order of sums may differ."""
    ids, mask = padded("right")
    epsilon = 1e-2
    model = tiny(model_name, torch.float64)
    client, _ = split_model(model, 2)
    with torch.no_grad(), paired(client.model, Probe(7, epsilon, law), rows=6):
        h_plus, h_minus = client(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
    for h, scale in ((h_plus, epsilon), (h_minus, -epsilon)):
        other, _ = split_model(tiny(model_name, torch.float64), 2)
        _written(other, 7, scale, law)
        with torch.no_grad():
            torch.testing.assert_close(h, other(ids, mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_bit_identical_after_a_probe(model_name, tiny, class_batch, dtype):
    client_half, _ = split_model(tiny(model_name, dtype), 2)
    before = _bits(client_half.model)
    ZerothOrderClient(client_half).probe(class_batch, seed=3, epsilon=1e-3)
    after = _bits(client_half.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_probe_that_fails_half_way_leaves_weights_and_forwards_as_they_were(tiny, padded):
    client_half, _ = split_model(tiny("opt"), 2)
    before, (ids, mask) = _bits(client_half.model), padded("none")
    expected = client_half(ids, mask)
    with pytest.raises(RuntimeError, match="expanded size"), paired(client_half.model, _PROBE, rows=4):
        client_half(ids, mask)
    assert all(torch.equal(before[name], p) for name, p in client_half.named_parameters())
    assert torch.equal(client_half(ids, mask), expected)


def _slope(epsilons, errors):
    return np.polyfit(np.log(epsilons), np.log(errors), 1)[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, inside jvp
def test_projected_and_loss_differences_approach_the_exact_derivative_with_slope_two(tiny, class_batch):
    """Oracle: forward-mode differentiation of the client, <g, J u>; tanh-GELU is smooth. float64, no dropout."""
    model = tiny("bert", torch.float64)
    model.set_attn_implementation("eager")  # the fused kernel has no forward-mode rule
    client_half, server_half = split_model(model, 2)
    client = ZerothOrderClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=lambda step: 0.0)
    g = server.gradient(client.forward(class_batch), class_batch.targets).gradient

    names = trained_parameters(client_half.model)
    values = {name: p.detach() for name, p in names.items()}
    u = {n: torch.from_numpy(direction(5, n, tuple(p.shape), "gaussian")).double() for n, p in values.items()}
    ids, mask = torch.from_numpy(class_batch.input_ids), torch.from_numpy(class_batch.targets.mask).long()

    def hidden(theta):
        base = {name.removeprefix("bert."): value for name, value in theta.items()}
        return functional_call(client_half.model.bert, base, (ids, mask)).last_hidden_state

    _, j_u = jvp(hidden, (values,), (u,))
    exact = float((g * j_u).sum())

    epsilons = np.array([1e-2, 5e-3, 2.5e-3, 1.25e-3])
    pairs = [client.probe(class_batch, 5, e) for e in epsilons]
    projected = [client.project(pair, g, e) for pair, e in zip(pairs, epsilons, strict=True)]
    assert 1.9 < _slope(epsilons, np.abs(np.array(projected) - exact)) < 2.1

    errors = []
    for e in epsilons:
        plus, minus = server.losses(list(client.probe(class_batch, 5, e)), class_batch.targets)
        errors.append(abs((plus - minus) / (2 * e) - exact))
    assert 1.9 < _slope(epsilons, np.array(errors)) < 2.1


def test_the_round_estimate_is_unbiased_within_its_standard_error(tiny, class_batch):
    """E[c u] against backprop's gradient, on one layer norm of the client (d = 64) in float64."""
    client_half, server_half = split_model(tiny("bert", torch.float64), 2)
    for name, p in client_half.named_parameters():
        p.requires_grad_("layer.1.output.LayerNorm" in name)
    client = ZerothOrderClient(client_half)
    server = FirstOrderServer(server_half, learning_rate=lambda step: 0.0)
    h = client_half(*client._inputs(class_batch))
    g = server.gradient(h, class_batch.targets).gradient
    h.backward(g)
    exact = np.concatenate([p.grad.numpy().ravel() for p in client.trained.values()])

    n, mean = 1500, np.zeros_like(exact)
    for seed in range(n):
        c = client.project(client.probe(class_batch, seed, 1e-4), g, 1e-4)
        u = np.concatenate(
            [direction(seed, k, tuple(p.shape), "gaussian").ravel() for k, p in client.trained.items()]
        )
        mean += c * u / n
    standard_error = np.linalg.norm(exact) * np.sqrt((exact.size + 1) / n)
    assert np.linalg.norm(mean - exact) < 3 * standard_error
    assert np.linalg.norm(mean - exact) < np.linalg.norm(exact)  # so zero would not pass
