"""Directions formed from the returned gradient: the oracle is autograd, which knows the gradient that they approach."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from hosl.core.rounds import StepInputs, hosl_residual_slopes_round
from hosl.core.targets import Batch, ClassTargets, StepReply
from hosl.parties.clients.guided import GuidedClient
from hosl.split import split_model
from tests.conftest import BLOCKS

ROWS, ETA, EPSILON = 5, 0.3, 1e-3
PRE_NORM = {"opt", "opt-projections", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "phi3"}
"""Families whose feed-forward layer is added to the residual stream as it is: nothing stands between it and the cut."""
ROUNDING = 1e-3
"""Of slopes, where a family's norms round to float32 in any dtype (RMS norms do): 6e-8 of h, over epsilon."""
FLOAT32_NORMS = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}


class _Linear:
    """A server whose loss is <g, h>: its dL/dh is g whatever h is, and any derivative can be had from autograd."""

    def __init__(self, g):
        self.g = g

    def step(self, activations, targets, *, step, want_gradient=False):
        return StepReply(float((self.g * activations).sum()), self.g.clone())

    def losses(self, activations, targets):
        raise NotImplementedError

    scores = losses


def _batch(padded, rows=ROWS, width=11):
    ids, mask = padded("right", rows=rows, width=width)
    return Batch(ids.numpy(), ClassTargets(mask.numpy().astype(np.int8), np.zeros(rows, np.int64)))


def _client(model, cut=BLOCKS, **options):
    half, _ = split_model(deepcopy(model), cut)
    return GuidedClient(half, **options)


def _gradient(client, batch, seed=3):
    h = client.forward(batch)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(h.shape, generator=generator, dtype=torch.float64).to(h.dtype) / h[0].numel()


def _exact(client, batch, g):
    """By output projection: the exact gradient [out, in + 1] of <g, h>, and g^T [x, 1] likewise, from autograd."""
    read, found = {}, {}
    output_projections = {
        name.removesuffix(".weight"): None for name in client.trained if name.endswith("weight")
    }
    modules = {name: client.half.model.get_submodule(name) for name in output_projections}
    hooks = [
        m.register_forward_pre_hook(lambda m, args, n=name: read.__setitem__(n, args[0].detach()))
        for name, m in modules.items()
    ]
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    (client.half(ids, mask) * g).sum().backward()
    for hook in hooks:
        hook.remove()
    for name, m in modules.items():

        def whole(weight, bias, m=m):
            weight = weight if isinstance(m, torch.nn.Linear) else weight.T
            return weight if bias is None else torch.cat([weight, bias[:, None]], 1)

        u = whole(*_outer(g, read[name], m))
        found[name] = (whole(m.weight.grad, None if m.bias is None else m.bias.grad), u / u.norm())
    for p in client.trained.values():
        p.grad = None
    return found


def _outer(g, x, m):
    weight = torch.einsum("rso,rsi->oi", g, x.reshape(*g.shape[:2], -1))  # OPT flattens rows and positions
    weight = weight if isinstance(m, torch.nn.Linear) else weight.T
    return weight, None if m.bias is None else g.sum((0, 1))


def _weights(client):
    return {name: p.detach().clone() for name, p in client.half.named_parameters()}


@pytest.mark.parametrize("blocks", [1, 2])
def test_slopes_are_the_exact_derivatives_along_g_x(tiny, model_name, padded, blocks):
    client = _client(tiny(model_name, torch.float64), blocks=blocks)
    batch = _batch(padded)
    g = _gradient(client, batch)
    expected = _exact(client, batch, g)
    h = client.forward_keeping_inputs(batch)
    assert torch.equal(h, client.forward(batch))
    names = client.guide(g)
    assert set(names) == set(expected)
    assert len(names) == 2 * blocks
    for name in names:
        gradient, u = expected[name]
        exact = float((gradient * u).sum())
        scale = float(gradient.norm())  # a direction may lie nearly across the gradient
        floor = ROUNDING if model_name in FLOAT32_NORMS else 1e-7
        # OPT's ReLU has kinks, which only a small enough step does not cross
        epsilons = (1e-5, 1e-6) if model_name.startswith("opt") else (1e-2, 1e-3)
        errors = [abs(client.slope(name, g, epsilon) - exact) / scale for epsilon in epsilons]
        assert errors[1] < max(1e-4, floor)
        # second order in epsilon: a ratio of 100, less what rounding leaves
        assert errors[1] < max(errors[0] / 30, floor)


def test_the_last_layer_before_the_cut_gets_its_whole_gradient(tiny, model_name, padded):
    if model_name not in PRE_NORM:
        pytest.skip("a norm stands between this family's feed-forward layer and the cut")
    client = _client(tiny(model_name, torch.float64))
    batch = _batch(padded)
    g = _gradient(client, batch)
    exact = _exact(client, batch, g)
    name = list(exact)[-1]
    gradient, u = exact[name]
    assert float((gradient * u).sum() / gradient.norm()) == pytest.approx(1.0, abs=1e-12)
    client.forward_keeping_inputs(batch)
    client.guide(g)
    assert client.slope(name, g, 1e-4) == pytest.approx(float(gradient.norm()), rel=1e-8)


def test_a_round_moves_the_writers_by_their_gradients_projection_and_nothing_else(tiny, model_name, padded):
    client = _client(tiny(model_name, torch.float64), blocks=2)
    batch = _batch(padded)
    g = _gradient(client, batch)
    exact, before = _exact(client, batch, g), _weights(client)
    names = [n for n, p in client.half.named_parameters() if p.requires_grad]
    server = _Linear(g)
    rtol, epsilon = (ROUNDING, 1e-3) if model_name in FLOAT32_NORMS else (1e-5, 1e-5)
    result = hosl_residual_slopes_round(
        client, server, batch, StepInputs(1, epsilon=epsilon, learning_rate=ETA)
    )
    moved = {name: p.detach() - before[name] for name, p in client.half.named_parameters()}
    assert {name for name, by in moved.items() if by.any()} == set(names) == set(client.trained)
    for name, (gradient, u) in exact.items():
        expected = -ETA * float((gradient * u).sum()) * u
        m, by = client.half.model.get_submodule(name), moved[f"{name}.weight"]
        by = by if isinstance(m, torch.nn.Linear) else by.T
        atol = ETA * rtol * float(gradient.norm()) * float(u.abs().max())
        torch.testing.assert_close(by, expected[:, : by.shape[1]], rtol=0.0, atol=atol)
    assert len(result.coefficients) == 4
    after = hosl_residual_slopes_round(
        client, server, batch, StepInputs(2, epsilon=epsilon, learning_rate=0.0)
    ).loss
    assert after < result.loss  # a direction is never uphill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_are_only_read_by_guide_and_slope(tiny, model_name, padded, dtype):
    client = _client(tiny(model_name, dtype), blocks=2)
    batch = _batch(padded)
    before = _weights(client)
    client.forward_keeping_inputs(batch)
    g = _gradient(client, batch)
    for name in client.guide(g):
        assert math.isfinite(client.slope(name, g, 1e-2))
    assert all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_micro_batches_change_nothing(tiny, model_name, padded, rows):
    model, batch = tiny(model_name, torch.float64), _batch(padded)
    found = []
    for at_once in (rows, 5):
        client = _client(model, blocks=2, micro_batch_size=at_once)
        server = _Linear(_gradient(client, batch))
        hosl_residual_slopes_round(client, server, batch, StepInputs(1, epsilon=EPSILON, learning_rate=ETA))
        found.append(_weights(client))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)


def test_bfloat16_slopes_are_near_the_exact_ones(tiny, padded):
    batch, errors = _batch(padded), []
    exact_client = _client(tiny("llama", torch.bfloat16).to(torch.float64))
    client = _client(tiny("llama", torch.bfloat16))
    g = _gradient(exact_client, batch)
    exact = _exact(exact_client, batch, g)
    client.forward_keeping_inputs(batch)
    for name in client.guide(g.to(torch.bfloat16)):
        gradient, u = exact[name]
        slope = float((gradient * u).sum())
        errors.append(abs(client.slope(name, g, 1e-1) - slope) / abs(slope))
    assert max(errors) < 0.1  # bfloat16 keeps 8 bits; a hidden state moves by 10 %


def test_a_gradient_of_zeros_moves_nothing(tiny, padded):
    client = _client(tiny("opt"))
    batch, before = _batch(padded), _weights(client)
    server = _Linear(torch.zeros_like(client.forward(batch)))
    result = hosl_residual_slopes_round(
        client, server, batch, StepInputs(1, epsilon=EPSILON, learning_rate=ETA)
    )
    assert result.coefficients == (0.0, 0.0)
    assert all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())
