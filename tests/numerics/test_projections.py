"""Directional derivatives on the client: by micro-batches, stacked, one-sided, by forward mode; and what they cost."""

import numpy as np
import pytest
import torch

from hosl.core.directions import direction
from hosl.core.rounds import (
    StepInputs,
    hosl_gradient_forward_mode_round,
    hosl_gradient_one_sided_round,
    hosl_gradient_round,
)
from hosl.core.targets import Batch, ClassTargets
from hosl.errors import NonFiniteError
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.memory import TorchMemory, resident_bytes
from hosl.parties.micro_batches import TOKENS_AT_ONCE, row_slices
from hosl.split import set_trainable, split_model
from tests.conftest import BLOCKS
from tests.numerics.slopes import slope
from tests.numerics.test_guided import FLOAT32_NORMS, _batch, _gradient, _Linear

SEEDS = [5, 6, 7]


def _client(model, distribution="gaussian", trainable="blocks", **options):
    half, _ = split_model(model, BLOCKS)
    set_trainable(half, trainable)
    return ZerothOrderClient(half, distribution=distribution, **options)


def _exact(client, batch, g, seed, distribution="gaussian"):
    """<dL/dtheta, u> with autograd's gradient."""
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.targets.mask).long()
    (client.half(ids, mask) * g).sum().backward()
    total = 0.0
    for name, p in client.trained.items():
        if p.grad is not None:
            total += float(
                (p.grad * torch.from_numpy(direction(seed, name, tuple(p.shape), distribution))).sum()
            )
            p.grad = None
    return total


@pytest.mark.parametrize("distribution", ["gaussian", "low-rank"])
@pytest.mark.parametrize("rows", [1, 2, None])
def test_micro_batches_change_nothing_but_rounding(tiny, model_name, padded, distribution, rows):
    model, batch = tiny(model_name, torch.float64), _batch(padded)
    some, whole = (
        _client(model, distribution, micro_batch_size=rows),
        _client(model, distribution, micro_batch_size=5),
    )
    g = _gradient(whole, batch)
    torch.testing.assert_close(some.forward(batch), whole.forward(batch), rtol=1e-10, atol=1e-12)
    pairs, expected = (list(c.probes(batch, SEEDS, 1e-2)) for c in (some, whole))
    assert len(pairs) == len(SEEDS)
    for found, wanted in zip(pairs, expected, strict=True):
        for h, wanted_h in zip(found, wanted, strict=True):
            torch.testing.assert_close(h, wanted_h, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(
        some.projections(batch, SEEDS, 1e-2, g), whole.projections(batch, SEEDS, 1e-2, g), strict=True
    ):
        np.testing.assert_allclose(found.rows, wanted.rows, rtol=1e-7, atol=1e-10)
        assert found.noise == pytest.approx(wanted.noise)


def test_low_rank_probes_of_a_step_share_their_forwards(tiny, padded, monkeypatch):
    client, batch = _client(tiny("opt"), "low-rank"), _batch(padded)
    seen, own_half = [], client.half

    def counting(ids, mask):
        seen.append(len(ids))
        return own_half(ids, mask)

    counting.model = own_half.model
    monkeypatch.setattr(client, "half", counting)
    list(client.probes(batch, SEEDS, 1e-3))
    assert seen == [2 * len(SEEDS) * 5]  # one forward for all
    seen.clear()
    monkeypatch.setattr(
        "hosl.parties.clients.zeroth_order.STACKED_TOKENS_AT_ONCE", 2 * 2 * batch.input_ids.size
    )
    list(client.probes(batch, SEEDS, 1e-3))
    assert seen == [
        2 * 2 * 5,
        3 * 2,
        2 * 2,
    ]  # two probes at once; the one that is left takes no more than 5 rows


def test_micro_batches_take_no_more_rows_than_the_batch_has():
    assert row_slices((16, 64), 1) == [slice(0, 16)]
    assert row_slices((16, 64), 2) == [slice(0, 8), slice(8, 16)]
    assert row_slices((5, 10), 2) == [slice(0, 3), slice(3, 5)]
    assert row_slices((64, 256), 1)[0] == slice(0, TOKENS_AT_ONCE // 256)
    assert row_slices((64, 256), 2)[0] == slice(0, TOKENS_AT_ONCE // 512)
    assert row_slices((2, 2 * TOKENS_AT_ONCE), 1) == [slice(0, 1), slice(1, 2)]
    assert row_slices((5, 10), 2, 4) == [slice(0, 4), slice(4, 5)]


def test_one_sided_errors_fall_with_epsilon_and_two_sided_ones_with_its_square(tiny, padded):
    client, batch = _client(tiny("bert", torch.float64)), _batch(padded)
    g = _gradient(client, batch)
    exact, clean = _exact(client, batch, g, 5), client.forward(batch)
    epsilons = [1e-3, 5e-4, 2.5e-4]
    one = [
        float(next(iter(client.one_sided_projections(batch, clean, [5], e, g))).rows.sum()) - exact
        for e in epsilons
    ]
    two = [slope(client, batch, 5, e, g) - exact for e in epsilons]
    for errors, order in ((one, 1), (two, 2)):
        fitted = np.polyfit(np.log(epsilons), np.log(np.abs(errors)), 1)[0]
        assert fitted == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher", "low-rank"])
def test_forward_mode_is_autograds_derivative(tiny, model_name, padded, distribution):
    model, batch = tiny(model_name, torch.float64), _batch(padded)
    client = _client(model, distribution, trainable="all", micro_batch_size=2)
    # autograd gives the padding's own embedding no gradient, right only where padding is not scored
    g = _gradient(client, batch) * torch.from_numpy(batch.targets.mask)[:, :, None]
    before = {name: p.detach().clone() for name, p in client.trained.items()}
    exact = [_exact(client, batch, g, seed, distribution) for seed in SEEDS]
    found = [float(p.rows.sum()) for p in client.tangents(batch, SEEDS, g)]
    # a float32 norm rounds by 6e-8; no epsilon divides that here, but a few dozen such sums follow each other
    assert found == pytest.approx(exact, rel=1e-5 if model_name in FLOAT32_NORMS else 1e-10)
    assert all(torch.equal(p, before[name]) for name, p in client.trained.items())
    assert all("forward" not in m.__dict__ for m in client.half.model.modules())


def test_every_variant_of_a_returned_gradient_makes_the_same_step(tiny, padded):
    """Two-sided, one-sided and forward-mode: the same update, as near as their errors let it be."""
    batch, moved = _batch(padded), []
    for variant in (hosl_gradient_round, hosl_gradient_one_sided_round, hosl_gradient_forward_mode_round):
        client = _client(tiny("bert", torch.float64))
        server = _Linear(_gradient(client, batch))
        result = variant(client, server, batch, StepInputs(1, seeds=SEEDS, learning_rate=1e-3, epsilon=1e-7))
        moved.append({name: p.detach().clone() for name, p in client.trained.items()})
        assert len(result.coefficients) == len(SEEDS)
    for other in moved[:2]:
        for name, p in other.items():
            torch.testing.assert_close(p, moved[2][name], rtol=1e-6, atol=1e-8)


def _wide(rows=16, tokens=32):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=500, hidden_size=128, ffn_dim=512, num_attention_heads=4, num_hidden_layers=BLOCKS,
        max_position_embeddings=64, word_embed_proj_dim=128,
    )  # fmt: skip
    ids = np.random.Generator(np.random.Philox(0)).integers(3, 500, (rows, tokens))
    return OPTForCausalLM(config), Batch(
        ids, ClassTargets(np.ones(ids.shape, np.int8), np.zeros(rows, np.int64))
    )


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_a_projected_probe_takes_little_more_memory_than_a_forward_pass(distribution):
    model, batch = _wide()
    client = _client(model, distribution)
    held = resident_bytes([*client.half.model.parameters(), *client.half.model.buffers()])
    g = _gradient(client, batch)
    forward, probe = TorchMemory(held), TorchMemory(held)
    forward.watch(client.forward, batch)
    probe.watch(lambda: list(client.projections(batch, SEEDS, 1e-3, g)))
    assert probe.peak_bytes <= 1.10 * forward.peak_bytes


def test_a_row_of_nan_rejects_its_direction_alone(tiny, padded, monkeypatch):
    client, batch = _client(tiny("bert", torch.float64)), _batch(padded)
    server, own = _Linear(_gradient(client, batch)), client._projected

    def broken(batch, probes, *args):
        found = own(batch, probes, *args)
        if probes[0].seed == 6:
            found[0].rows[1] = np.nan
        return found

    monkeypatch.setattr(client, "_projected", broken)
    before = {name: p.detach().clone() for name, p in client.trained.items()}
    result = hosl_gradient_round(
        client, server, batch, StepInputs(1, seeds=SEEDS, epsilon=1e-3, learning_rate=0.1)
    )
    assert result.rejected == 1
    assert len(result.coefficients) == 2
    name = next(iter(before))
    directions = [torch.from_numpy(direction(s, name, tuple(before[name].shape), "gaussian")) for s in (5, 7)]
    step = 0.1 / 2 * sum(u * c for u, c in zip(directions, result.coefficients, strict=True))
    # scales are rounded to float32 for the journal
    atol = 1e-6 * float(step.abs().max())
    torch.testing.assert_close(client.trained[name].detach(), before[name] - step, rtol=0.0, atol=atol)
    with pytest.raises(NonFiniteError, match="all 1 probes of a step were rejected"):
        hosl_gradient_round(client, server, batch, StepInputs(2, seeds=[6], epsilon=1e-3, learning_rate=0.1))


def test_the_noise_floor_is_what_float32_does_to_a_projection(tiny, padded):
    """Against float64 at an epsilon so small that rounding is all there is."""
    batch, epsilon, seeds = _batch(padded), 1e-5, list(range(12))
    exact_client, client = _client(tiny("bert", torch.float64)), _client(tiny("bert"))
    g = _gradient(exact_client, batch)
    exact = np.array([p.rows.sum() for p in exact_client.projections(batch, seeds, epsilon, g)])
    found = list(client.projections(batch, seeds, epsilon, g.float()))
    error = np.sqrt(np.mean((np.array([p.rows.sum() for p in found]) - exact) ** 2))
    noise = np.mean([p.noise for p in found])
    assert noise / 2 < error < 30 * noise  # a floor: rounding inside the half adds to it
