"""The engine on families with experts, attention sinks, alibi, tuples and shared tables.

Four rows and four heads, and sixteen rows of four evaluations as distances: an argument of a block that is cut by the
wrong dimension has the right size.
"""

import pytest
import torch

from hosl.core.directions import DISTRIBUTIONS
from hosl.errors import ConfigError, SplitError
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.engine.forward_mode import along
from hosl.parties.engine.perturbation import Probe, stacked
from hosl.split import quantise_, set_trainable, split_model
from hosl.split.quantised import Int8Linear
from tests.contract.test_recomputing_client import _assert_same, _updates
from tests.families import UNUSUAL
from tests.numerics.test_guided import _batch, _client, _exact, _gradient
from tests.numerics.test_nodes import _client as _node_client
from tests.numerics.test_nodes import _query
from tests.numerics.test_probes import _written

ROWS, WIDTH = 4, 7
every_family = pytest.mark.parametrize("name", UNUSUAL)


def _float64(tiny, name):
    model = tiny(name, torch.float64)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def _half(tiny, name):
    half, _ = split_model(_float64(tiny, name), 2)
    set_trainable(half, "all")
    return half


@every_family
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_two_probes_at_once_equal_forwards_with_the_weights_written(tiny, padded, name, distribution):
    """Every weight trained: experts, routers and sinks too. float64: only the order of sums may differ."""
    ids, mask = padded("right", rows=ROWS, width=WIDTH)
    probes = [Probe(7, 1e-2, distribution), Probe(8, 1e-3, distribution)]
    half = _half(tiny, name)
    before = {n: p.detach().clone() for n, p in half.named_parameters()}
    with torch.no_grad(), stacked(half.model, probes, 4 * ROWS):
        found = half(ids.repeat(4, 1), mask.repeat(4, 1)).chunk(4)
    assert all(torch.equal(p, before[n]) for n, p in half.named_parameters())
    signs = [(probe, sign) for probe in probes for sign in (1, -1)]
    for h, (probe, sign) in zip(found, signs, strict=True):
        other = _half(tiny, name)
        frozen = {n: p.detach().clone() for n, p in other.named_parameters() if not p.requires_grad}
        _written(other, probe.seed, sign * probe.epsilon, distribution)
        with torch.no_grad():
            for n, p in other.named_parameters():
                if n in frozen:
                    p.copy_(frozen[n])
            expected = other(ids, mask)
        assert not torch.allclose(expected, half(ids, mask), rtol=1e-7)
        torch.testing.assert_close(h, expected, rtol=1e-6, atol=1e-6)


@every_family
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_a_recomputed_step_is_that_of_ordinary_backprop(tiny, padded, name, micro_batch_size):
    model, batch = tiny(name), _batch(padded, rows=ROWS, width=WIDTH)
    _, expected = _updates(FirstOrderClient, model, 3, "all", batch)
    _, found = _updates(RecomputingClient, model, 3, "all", batch, micro_batch_size=micro_batch_size)
    _assert_same(found, expected, torch.float32)


@every_family
def test_slopes_along_the_writers_are_the_exact_ones_for_any_micro_batch(tiny, padded, name):
    batch = _batch(padded, rows=ROWS, width=WIDTH)
    whole = _client(_float64(tiny, name), blocks=2)
    g = _gradient(whole, batch)
    exact = _exact(whole, batch, g)
    for client in (whole, _client(_float64(tiny, name), blocks=2, micro_batch_size=3)):
        client.forward_keeping_inputs(batch)
        names = client.guide(g)
        assert set(names) == set(exact)
        for writer in names:
            gradient, u = exact[writer]
            error = abs(client.slope(writer, g, 1e-5) - float((gradient * u).sum()))
            assert error < 1e-2 * float(gradient.norm())


@every_family
def test_a_shifted_query_moves_the_answer_at_its_own_token_only(tiny, padded, name):
    if name == "deberta-v2":
        with pytest.raises(
            SplitError, match="a layer of a block that computes the tokens' queries alone, which hosl"
        ):
            _node_client(tiny(name))
        return
    client, batch = _node_client(_float64(tiny, name)), _batch(padded)
    client.forward_keeping_inputs(batch)
    clean, features = client.forward(batch), client.half.query_features

    def moved(which):
        def shift(layer, args, output):
            shifted = output.clone()
            shifted[:, 4, which] += 0.5 * torch.arange(1, len(which) + 1).to(output)
            return shifted

        hook = _query(client).register_forward_hook(shift)
        try:
            return (client.forward(batch) - clean).abs().amax(-1) > 1e-10
        finally:
            hook.remove()

    by_queries = moved(features)
    assert by_queries[:, 4].all()
    assert not by_queries[:, :4].any()
    assert not by_queries[:, 5:].any()
    assert len(features) == 32
    for other in sorted(set(range(len(_query(client).weight))) - set(features.tolist())):
        assert moved(torch.tensor([other]))[:, 5:].any()


@every_family
def test_forward_mode_is_the_limit_of_differences_or_refused_in_one_line(tiny, padded, name):
    ids, mask = padded("right", rows=ROWS, width=WIDTH)
    half = _half(tiny, name)
    before = half.config._experts_implementation
    if name == "bloom":  # its activation is a function of its own, without a rule
        with pytest.raises(
            ConfigError, match=r"a step of this bloom has no such rule .*leave it at difference"
        ):
            _tangent(half, ids, mask)
        return
    found = _tangent(half, ids, mask)
    assert half.config._experts_implementation == before
    probe = Probe(5, 1e-6, "rademacher")
    with torch.no_grad(), stacked(half.model, [probe], 2 * ROWS):
        plus, minus = half(ids.repeat(2, 1), mask.repeat(2, 1)).chunk(2)
    expected = (plus - minus) / (2 * probe.epsilon)
    assert torch.linalg.norm(found - expected) < 1e-2 * torch.linalg.norm(
        expected
    )  # float32 norms, over epsilon


def _tangent(half, ids, mask):
    with torch.no_grad(), along(half.model, 5, "rademacher") as tangent_of:
        return tangent_of(half(ids, mask)).clone()


@every_family
def test_an_int8_half_is_its_written_out_self(tiny, padded, name):
    """Against the rounded weights, not the original ones: rounding sends a token to another expert here and there."""
    ids, mask = padded("left")
    half, written = (split_model(tiny(name), 2)[0] for _ in range(2))
    quantise_(half, "int8")
    layers = 0
    with torch.no_grad():
        for module, other in zip(half.model.modules(), written.model.modules(), strict=True):
            if isinstance(module, Int8Linear):
                layers += 1
                other.weight.copy_(module.weight.to(torch.float32) * module.scale[:, None])
        found = half(ids, mask)
        assert layers >= 8
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, written(ids, mask), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, split_model(tiny(name), 2)[0](ids, mask), rtol=1e-4, atol=1e-5)
