"""Node perturbation of the last block's queries; the oracle is autograd's gradient at the query layer's output."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from hosl.core.directions import tile
from hosl.core.rounds import StepInputs, hosl_node_round, hosl_residual_slopes_round
from hosl.errors import NonFiniteError
from hosl.parties.clients.node import NodeClient
from hosl.split import split_model
from tests.conftest import BLOCKS
from tests.numerics.test_guided import FLOAT32_NORMS, ROUNDING, _batch, _gradient, _Linear

ETA, EPSILON = 0.3, 1e-4
SEEDS = [11, 12, 13]
FUSED = ["gpt2", "gpt_neox", "phi3"]


def _client(model, cut=BLOCKS, **options):
    half, _ = split_model(deepcopy(model), cut)
    return NodeClient(half, **options)


def _query(client):
    return client.half.model.get_submodule(client.half.blocks_name)[-1].get_submodule(client.half.query)


def _at_query(client, batch, g):
    """x, what the query layer reads, and dL/dq of L = <g, h> at its output, from autograd; [rows, seq, ...]."""
    seen = {}

    def keep(layer, args, output):
        output.retain_grad()
        seen["x"], seen["q"] = args[0].detach(), output

    hook = _query(client).register_forward_hook(keep)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    (client.half(ids, mask) * g).sum().backward()
    hook.remove()
    client.half.model.zero_grad()
    return seen["x"], seen["q"].grad[..., client.half.query_features]


def _u(client, seed, batch):
    shape = (*batch.input_ids.shape, len(client.half.query_features))
    name = f"{client.half.blocks_name}.{client.half.cut - 1}.{client.half.query}/nodes"
    return torch.from_numpy(tile(seed, name, 0, int(np.prod(shape)), "rademacher")).view(shape).double()


def _weights(client):
    return {name: p.detach().clone() for name, p in client.half.named_parameters()}


def test_a_shifted_query_moves_the_answer_at_its_own_token_only(tiny, model_name, padded):
    client, batch = _client(tiny(model_name, torch.float64)), _batch(padded)
    client.forward_keeping_inputs(batch)
    clean, features = client.forward(batch), client.half.query_features

    def shifted(at, which):
        def shift(layer, args, output):
            moved = output.clone()
            moved[:, at, which] += 0.5 * torch.arange(1, len(which) + 1).to(output)
            return moved

        hook = _query(client).register_forward_hook(shift)
        try:
            return (client.forward(batch) - clean).abs().amax(-1) > 1e-12
        finally:
            hook.remove()

    moved = shifted(4, features)
    assert moved[:, 4].all()
    assert not moved[:, :4].any()
    assert not moved[:, 5:].any()
    others = torch.tensor(
        sorted(set(range(_out_features(client))) - set(features.tolist())), dtype=torch.int64
    )
    assert bool(len(others)) == (model_name in FUSED)
    for feature in others:  # each key or value is read by other tokens: none of them is a query
        assert shifted(4, feature[None])[:, 5:].any()


def _out_features(client):
    weight = _query(client).weight
    return weight.shape[0 if isinstance(_query(client), torch.nn.Linear) else 1]


def test_slopes_are_the_tokens_exact_derivatives(tiny, model_name, padded):
    client, batch = _client(tiny(model_name, torch.float64), micro_batch_size=2), _batch(padded)
    g = _gradient(client, batch)
    _, exact_gradient = _at_query(client, batch, g)
    clean = client.forward_keeping_inputs(batch)
    floor = ROUNDING if model_name in FLOAT32_NORMS else 1e-6
    for seed, found in zip(SEEDS, client.node_slopes(clean, SEEDS, EPSILON, g), strict=True):
        exact = (exact_gradient * _u(client, seed, batch)).sum(-1)
        assert found.shape == batch.input_ids.shape
        error = float(np.linalg.norm(found - exact.numpy()) / exact.norm())
        if (
            model_name not in FLOAT32_NORMS
        ):  # first order in epsilon: a tenth of the scale, a tenth of the error
            (finer,) = client.node_slopes(clean, [seed], EPSILON / 10, g)
            finer_error = float(np.linalg.norm(finer - exact.numpy()) / exact.norm())
            assert finer_error < max(error / 8, floor)
        assert error < max(1e-2, floor)


def test_a_round_moves_the_queries_by_the_estimate_and_the_writers_as_a_guided_round(
    tiny, model_name, padded
):
    model, batch = tiny(model_name, torch.float64), _batch(padded)
    client, guided = _client(model), _client(model)
    g, features = _gradient(client, batch), client.half.query_features
    x, _ = _at_query(client, batch, g)
    clean = client.forward_keeping_inputs(batch)
    slopes = list(client.node_slopes(clean, SEEDS, EPSILON, g))
    before, query = _weights(client), _query(client)
    result = hosl_node_round(
        client, _Linear(g), batch, StepInputs(1, seeds=SEEDS, epsilon=EPSILON, learning_rate=ETA)
    )
    hosl_residual_slopes_round(guided, _Linear(g), batch, StepInputs(1, epsilon=EPSILON, learning_rate=ETA))
    at_nodes = sum(
        torch.from_numpy(s)[:, :, None] * _u(client, q, batch) for s, q in zip(slopes, SEEDS, strict=True)
    ) / len(SEEDS)
    name = f"{client.half.blocks_name}.{BLOCKS - 1}.{client.half.query}"
    moved = query.weight.detach() - before[f"{name}.weight"]
    moved = moved if isinstance(query, torch.nn.Linear) else moved.T
    expected = -ETA * torch.einsum("rto,rti->oi", at_nodes, x)
    torch.testing.assert_close(moved[features], expected, rtol=1e-9, atol=1e-12)
    others = sorted(set(range(len(moved))) - set(features.tolist()))
    assert not moved[others].any()
    if query.bias is not None:
        torch.testing.assert_close(
            (query.bias.detach() - before[f"{name}.bias"])[features],
            -ETA * at_nodes.sum((0, 1)),
            rtol=1e-9,
            atol=1e-12,
        )
    for other, p in guided.half.named_parameters():
        if not other.startswith(name):
            assert torch.equal(p, dict(client.half.named_parameters())[other])
    assert result.coefficients[2:] == pytest.approx([float(s.sum()) for s in slopes], rel=1e-12)


def test_the_estimate_is_the_gradient_on_average(tiny, padded):
    client, batch = _client(tiny("bert", torch.float64)), _batch(padded)
    g = _gradient(client, batch)
    x, gradient = _at_query(client, batch, g)
    exact = torch.einsum("rto,rti->oi", gradient, x)
    clean = client.forward_keeping_inputs(batch)
    found = []
    for seed, s in zip(range(400), client.node_slopes(clean, range(400), 1e-6, g), strict=True):
        at_nodes = torch.from_numpy(s)[:, :, None] * _u(client, seed, batch)
        estimate = torch.einsum("rto,rti->oi", at_nodes, x)
        found.append(float((estimate * exact).sum() / (exact * exact).sum()))
    standard_error = np.std(found, ddof=1) / len(found) ** 0.5
    assert standard_error < 0.1
    assert np.mean(found) == pytest.approx(1.0, abs=4 * standard_error)


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_nothing(tiny, padded, rows):
    model, batch, found = tiny("gpt_neox", torch.float64), _batch(padded), []
    for at_once in (rows, 5):
        client = _client(model, micro_batch_size=at_once)
        server = _Linear(_gradient(client, batch))
        hosl_node_round(client, server, batch, StepInputs(1, seeds=SEEDS, epsilon=EPSILON, learning_rate=ETA))
        found.append(_weights(client))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weights_are_only_read_by_slopes(tiny, padded, dtype):
    client, batch = _client(tiny("llama", dtype)), _batch(padded)
    before, clean = _weights(client), client.forward_keeping_inputs(batch)
    for slopes in client.node_slopes(clean, SEEDS, 1e-2, _gradient(client, batch)):
        assert np.isfinite(slopes).all()
    assert all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())


def test_a_gradient_of_zeros_moves_nothing_and_one_of_nan_is_refused(tiny, padded):
    client, batch = _client(tiny("opt")), _batch(padded)
    before, zeros = _weights(client), torch.zeros_like(client.forward(batch))
    for g in (zeros, zeros + torch.nan):
        if g.isnan().any():
            with pytest.raises(NonFiniteError, match="were rejected"):
                hosl_node_round(
                    client, _Linear(g), batch, StepInputs(1, seeds=SEEDS, epsilon=EPSILON, learning_rate=ETA)
                )
        else:
            hosl_node_round(
                client, _Linear(g), batch, StepInputs(1, seeds=SEEDS, epsilon=EPSILON, learning_rate=ETA)
            )
        assert all(torch.equal(p, before[name]) for name, p in client.half.named_parameters())
