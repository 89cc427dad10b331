"""Probes against someone else: two forwards with the weights written, exact derivatives, the weights' own bits."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp

from hosl.core.directions import DISTRIBUTIONS, direction
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.perturbation import SCRATCH_ELEMENTS, Probe, stacked, trained_parameters
from hosl.parties.servers.basic import FirstOrderServer
from hosl.split import split_model
from tests.numerics.slopes import slope

_PROBE = Probe(seed=3, epsilon=1e-3, distribution="gaussian")


def _bits(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _written(half, seed, scale, distribution):
    """The half's weights at theta + scale u, written out."""
    with torch.no_grad():
        for name, p in half.named_parameters():
            p.add_(torch.from_numpy(direction(seed, name, tuple(p.shape), distribution)), alpha=scale)


def _two_forwards(tiny, model_name, probe, padded_batch, dtype=torch.float64):
    """h at theta + epsilon u and at theta - epsilon u, each from a model of its own with its weights written."""
    outputs = []
    for scale in (probe.epsilon, -probe.epsilon):
        half, _ = split_model(tiny(model_name, dtype), 2)
        _written(half, probe.seed, scale, probe.distribution)
        with torch.no_grad():
            outputs.append(half(*padded_batch))
    return outputs


@pytest.mark.parametrize("scratch", [SCRATCH_ELEMENTS, 100])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_probe_equals_two_forwards_with_the_weights_written(
    model_name, tiny, padded, distribution, scratch, monkeypatch
):
    """Every family, every weight trained, embeddings too. float64: only the order of sums may differ."""
    monkeypatch.setattr(
        "hosl.parties.engine.perturbation.SCRATCH_ELEMENTS", scratch
    )  # 100: three rows at a time
    ids, mask = padded("right")
    probe = Probe(7, 1e-2, distribution)
    client, _ = split_model(tiny(model_name, torch.float64), 2)
    with torch.no_grad(), stacked(client.model, [probe], 6):
        pair = client(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
    for h, expected in zip(pair, _two_forwards(tiny, model_name, probe, (ids, mask)), strict=True):
        torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distribution", ["rademacher", "low-rank"])
def test_stacked_probes_equal_those_that_go_one_by_one(model_name, tiny, padded, distribution):
    ids, mask = padded("right")
    probes = [Probe(seed, epsilon, distribution) for seed, epsilon in ((1, 1e-2), (2, 1e-2), (3, 1e-3))]
    client, _ = split_model(tiny(model_name, torch.float64), 2)
    with torch.no_grad(), stacked(client.model, probes, rows=18):
        together = client(ids.repeat(6, 1), mask.repeat(6, 1)).chunk(3)
    for probe, pair in zip(probes, together, strict=True):
        with torch.no_grad(), stacked(client.model, [probe], 6):
            alone = client(ids.repeat(2, 1), mask.repeat(2, 1))
        torch.testing.assert_close(pair, alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "low-rank"])
def test_in_bfloat16_a_probe_is_as_near_to_the_exact_one_as_two_forwards_are(
    model_name, tiny, padded, distribution
):
    """Exact: the same bfloat16 weights, shifted and multiplied in float64."""
    ids, mask = padded("none")
    probe = Probe(7, 2e-2, distribution)
    client, _ = split_model(tiny(model_name, torch.bfloat16), 2)
    with torch.no_grad(), stacked(client.model, [probe], 6):
        pair = client(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
    written = _two_forwards(tiny, model_name, probe, (ids, mask), torch.bfloat16)
    for h, other, sign in zip(pair, written, (1, -1), strict=True):
        half, _ = split_model(tiny(model_name, torch.bfloat16), 2)
        half.convert(torch.float64)
        _written(half, probe.seed, sign * probe.epsilon, distribution)
        with torch.no_grad():
            exact = half(ids, mask)
        assert torch.linalg.norm(h - exact) <= 1.5 * torch.linalg.norm(other - exact)


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
    with pytest.raises(RuntimeError, match="expanded size"), stacked(client_half.model, [_PROBE], 4):
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
    projected = [slope(client, class_batch, 5, float(e), g) for e in epsilons]
    assert 1.9 < _slope(epsilons, np.abs(np.array(projected) - exact)) < 2.1

    errors = []
    for e in epsilons:
        plus, minus = server.losses(list(client.probe(class_batch, 5, float(e))), class_batch.targets)
        errors.append(abs((plus - minus) / (2 * e) - exact))
    assert 1.9 < _slope(epsilons, np.array(errors)) < 2.1


@pytest.mark.usefixtures("unchecked")
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
        c = slope(client, class_batch, seed, 1e-4, g)
        u = np.concatenate(
            [direction(seed, k, tuple(p.shape), "gaussian").ravel() for k, p in client.trained.items()]
        )
        mean += c * u / n
    standard_error = np.linalg.norm(exact) * np.sqrt((exact.size + 1) / n)
    assert np.linalg.norm(mean - exact) < 3 * standard_error
    assert np.linalg.norm(mean - exact) < np.linalg.norm(exact)  # so zero would not pass
