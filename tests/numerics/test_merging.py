"""Losses and gradients of several clients in one pass are those of each one's own pass, whatever they ask together."""

import numpy as np
import pytest
import torch

from hosl.core.targets import ClassTargets, OptionTargets
from hosl.errors import NonFiniteError
from hosl.parties.engine.merging import Part, loss_of, merged_losses
from hosl.parties.servers.synchronous import Contributed, SynchronousServer
from hosl.split import split_model

CAUSAL = (
    "opt",
    "gpt2",
    "llama",
    "gemma2",
)  # positions: none, none, rotary, rotary with windows and soft caps
CLASSIFIERS = ("bert", "distilbert", "qwen2 (class)")
LENGTHS = (16, 16, 15, 14, 9, 8)  # 16, 15 and 14 go together, and 9 and 8
WIDTH = 32


def _targets(name, index, length, mean_over):
    """The targets of one client: rows, padding, spans and positions are its own."""
    generator = np.random.default_rng(index)
    rows = 1 + index % 3
    mask = np.ones((rows, length), np.int8)
    if name in CLASSIFIERS:
        mask[-1, length - index :] = 0
        return ClassTargets(mask, generator.integers(0, 5, rows))
    mask[0, :index] = 0
    span = 1 + index % 2
    places = [generator.choice(np.arange(index, length - 1), span, replace=False) for _ in range(rows)]
    positions, tokens = np.sort(places, axis=1), generator.integers(3, 97, (rows, span))
    if span > 1:
        positions[0, 1], tokens[0, 1] = 0, -1  # this row has one scored token, the others two
    return OptionTargets(mask, positions.astype(np.int32), tokens.astype(np.int32), mean_over)


def _parts(name, dtype, mean_over="rows", lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    parts = []
    for index, length in enumerate(lengths):
        targets = _targets(name, index, length, mean_over)
        h = torch.randn(len(targets.mask), length, WIDTH, generator=generator, dtype=torch.float64)
        parts.append(Part(h.to(dtype), targets))
    return parts


def _half(tiny, name, dtype=torch.float32):
    return split_model(tiny(name, dtype=dtype), 1)[1]


@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
@pytest.mark.parametrize("name", [*CAUSAL, *CLASSIFIERS])
def test_merged_losses_are_those_of_each_alone(tiny, name, mean_over):
    """In float32 within 3e-7 of the loss; in float64, where rounding does not hide a mistake, within 1e-12."""
    if name in CLASSIFIERS and mean_over == "tokens":
        pytest.skip("of classes there is one mean")
    exact = () if name == "gemma2" else ((torch.float64, 1e-12),)  # its own mask is NaN in float64
    for dtype, tolerance in ((torch.float32, 3e-7), *exact):
        half, parts = _half(tiny, name, dtype), _parts(name, dtype, mean_over)
        with torch.no_grad():
            alone = [float(loss_of(half, part)) for part in parts]
            merged = [float(loss) for loss in merged_losses(half, parts)]
        assert merged == pytest.approx(alone, rel=tolerance)


def test_as_few_passes_are_made_as_an_eighth_of_padding_allows(tiny, monkeypatch):
    half, shapes = _half(tiny, "opt"), []
    forward = type(half).__call__

    def counted(half, hidden, mask, positions=None, cache=None):
        if positions.dim() == 2:
            shapes.append(tuple(hidden.shape[:2]))
        return forward(half, hidden, mask, positions, cache)

    monkeypatch.setattr(type(half), "__call__", counted)
    parts = _parts("opt", torch.float32)
    with torch.no_grad():
        merged_losses(half, [*parts, *_parts("opt", torch.float64, lengths=())])
    assert shapes == [(sum(len(h) for h, _ in parts[:4]), 16), (sum(len(h) for h, _ in parts[4:]), 9)]


def test_a_batch_that_no_other_goes_with_has_todays_bits(tiny):
    half, parts = _half(tiny, "opt"), _parts("opt", torch.float32, lengths=(16, 12, 8))
    with torch.no_grad():
        assert [float(loss) for loss in merged_losses(half, parts)] == [
            float(loss_of(half, part)) for part in parts
        ]


def _server(tiny, name, dtype):
    return SynchronousServer(_half(tiny, name, dtype), learning_rate=lambda step: 0.1)


def _contributed(parts):
    return [
        Contributed(h, targets, weight=len(h), want_gradient=index != 1)
        for index, (h, targets) in enumerate(parts)
    ]


def _one_by_one(server, contributed):
    return [
        server.contribute(part.activations, part.targets, part.weight, want_gradient=part.want_gradient)
        for part in contributed
    ]


@pytest.mark.parametrize("name", ["opt", "llama", "bert"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_round_in_one_backward_pass_gives_each_client_its_own_gradient_and_the_half_the_same_update(
    tiny, name, dtype
):
    parts = _contributed(_parts(name, dtype))
    one, many = (_server(tiny, name, dtype) for _ in range(2))
    replies, merged = _one_by_one(one, parts), many.contribute_together(parts)
    one.apply(1)
    many.apply(1)
    relative = {torch.float32: 3e-7, torch.float64: 1e-12}[dtype]
    assert [reply.loss for reply in merged] == pytest.approx([reply.loss for reply in replies], rel=relative)
    for ours, theirs in zip(merged, replies, strict=True):
        assert (ours.gradient is None) == (theirs.gradient is None)
        if ours.gradient is not None:
            assert (ours.gradient - theirs.gradient).norm() <= 10 * relative * theirs.gradient.norm()
    for key, p in one.trained.items():
        torch.testing.assert_close(many.trained[key], p, rtol=0, atol=relative)


@pytest.mark.parametrize("name", ["opt", "bert"])
def test_what_one_client_sends_does_not_reach_the_others(tiny, name):
    """Activations that overflow: that client's loss is NaN, the others' are theirs; of a round nothing is added."""
    parts = _parts(name, torch.float32, lengths=(16, 16, 15))
    bad = parts[1]
    bad.activations[0, 5] = torch.finfo(torch.float32).max
    server, untouched = (_server(tiny, name, torch.float32) for _ in range(2))
    losses = server.losses_together([([h], targets) for h, targets in parts])
    assert np.isnan(losses[1][0])
    for index in (0, 2):
        assert losses[index] == pytest.approx(server.losses([parts[index].activations], parts[index].targets))
    contributed = _contributed(parts)
    with pytest.raises(NonFiniteError):
        server.contribute_together(contributed)
    for of_server in (server, untouched):
        _one_by_one(of_server, [contributed[0], contributed[2]])
        of_server.apply(1)
    for key, p in untouched.trained.items():
        assert torch.equal(server.trained[key], p)
