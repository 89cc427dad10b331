"""Recomputing block by block changes the memory, not the step; the oracle is `FirstOrderClient` with torch's SGD."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from hosl.core.targets import Batch, ClassTargets
from hosl.errors import NonFiniteError
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.split import LoraSpec, add_lora, set_trainable, split_model
from tests.contract.test_adapters import _targets

ROWS, ETA = 5, 0.5
RTOL = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Of the half's largest update. An update is read as a difference of weights near 1, and is a sum of 55 positions
through three blocks: some hundred roundings of 1e-16 or 6e-8. Gemma's norms round to float32 in any dtype."""

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out", "ignore:`is_gradient_checkpointing`:FutureWarning"
)


def _batch(padded, side="right", width=11):
    ids, mask = padded(side, rows=ROWS, width=width)
    return Batch(ids.numpy(), ClassTargets(mask.numpy().astype(np.int8), np.zeros(ROWS, np.int64)))


def _half(model, cut, trainable):
    half, _ = split_model(deepcopy(model), cut)
    if trainable == "lora":
        add_lora(half, LoraSpec(r=3, alpha=6, target_modules=_targets(half)), seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():  # B starts at zero, and then A has no gradient
            for p in half.parameters():
                if p.requires_grad:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    else:
        set_trainable(half, trainable)
    return half


def _updates(kind, model, cut, trainable, batch, steps=1, **options):
    """h of the first step, and by how much each tensor of the half has changed after the last."""
    half = _half(model, cut, trainable)
    before = {name: p.detach().clone() for name, p in half.named_parameters()}
    client = kind(half, **options)
    first = None
    for step in range(steps):
        h = client.forward_for_backward(batch)
        first = h.clone() if first is None else first
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(h.shape, generator=generator, dtype=h.dtype) / h[0].numel()
        asked = gradient.clone()
        client.backward(gradient, ETA)
        assert torch.equal(gradient, asked)  # it is the server's, which may give it again
    assert all(p.grad is None for p in half.parameters())
    return first, {name: p.detach() - before[name] for name, p in half.named_parameters()}


def _assert_same(found, expected, dtype):
    largest = max(float(update.abs().max()) for update in expected.values())
    assert largest > 1e-3
    for name, update in expected.items():
        torch.testing.assert_close(
            found[name], update, rtol=0, atol=RTOL[dtype] * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", RTOL, ids=["fp64", "fp32"])
@pytest.mark.parametrize("trainable", ["blocks", "all", "last-block", "lora"])
def test_a_recomputed_step_is_that_of_ordinary_backprop(tiny, model_name, padded, trainable, dtype):
    """Every family; 5 rows, so that micro-batches of 3 leave a rest."""
    model, batch = tiny(model_name, dtype), _batch(padded)
    h, expected = _updates(FirstOrderClient, model, 3, trainable, batch)
    allowed = torch.float32 if model_name.startswith("gemma") else dtype
    for micro_batch_size in (None, 1, 3):
        again, found = _updates(
            RecomputingClient, model, 3, trainable, batch, micro_batch_size=micro_batch_size
        )
        if micro_batch_size is None:
            assert torch.equal(again, h)
        _assert_same({"h": again}, {"h": h}, allowed)  # fewer rows at once round differently
        _assert_same(found, expected, allowed)
        if micro_batch_size is None and trainable != "all":  # the same sums in the same order
            assert all(torch.equal(found[name], update) for name, update in expected.items())


@pytest.mark.parametrize("trainable", ["blocks", "all"])
@pytest.mark.parametrize("family", ["opt", "opt-projections", "gpt2", "llama", "bert"])
@pytest.mark.parametrize("cut", [0, 1])
def test_a_client_of_few_blocks_takes_the_same_steps(tiny, padded, family, cut, trainable):
    """Three steps: what one leaves behind must not reach the next. At cut 0 there are the embeddings alone."""
    model, batch = tiny(family, torch.float64), _batch(padded)
    options = {"model": model, "cut": cut, "trainable": trainable, "batch": batch, "steps": 3}
    if (cut, trainable) == (0, "blocks"):
        _, found = _updates(RecomputingClient, **options)
        assert not any(update.any() for update in found.values())  # nothing to train, and nothing in the way
        return
    _, expected = _updates(FirstOrderClient, **options)
    _, found = _updates(RecomputingClient, **options, micro_batch_size=2)
    _assert_same(found, expected, torch.float64)


@pytest.mark.parametrize("trainable", ["blocks", "all", "lora"])
@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize(
    "spec",
    [OptimiserSpec(name="adamw", weight_decay=0.1), OptimiserSpec(momentum=0.9, weight_decay=0.1)],
    ids=["adamw", "momentum"],
)
def test_an_optimiser_takes_the_steps_that_it_takes_after_ordinary_backprop(
    tiny, padded, family, trainable, spec
):
    """Whole batches have the same bits. Parts of one round differently, which AdamW makes a step of full size where a
    gradient should be 0, such as that of the bias of keys."""
    model, batch = tiny(family, torch.float64), _batch(padded)
    options = {
        "model": model,
        "cut": 3,
        "trainable": trainable,
        "batch": batch,
        "steps": 3,
        "optimiser": spec,
    }
    _, expected = _updates(FirstOrderClient, **options)
    _, found = _updates(RecomputingClient, **options)
    assert all(torch.equal(found[name], update) for name, update in expected.items())
    assert max(float(update.abs().max()) for update in expected.values()) > 1e-3
    if spec.momentum:
        _, found = _updates(RecomputingClient, **options, micro_batch_size=2)
        _assert_same(found, expected, torch.float64)


def test_a_gradient_that_is_no_number_is_refused_by_an_optimiser(tiny, padded):
    client = RecomputingClient(_half(tiny("opt"), 3, "lora"), optimiser=OptimiserSpec(name="adamw"))
    before = {name: p.detach().clone() for name, p in client.trained.items()}
    h = client.forward_for_backward(_batch(padded))
    with pytest.raises(NonFiniteError):
        client.backward(torch.full_like(h, torch.nan), ETA)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in client.trained.items())


@pytest.mark.parametrize("trainable", ["blocks", "all"])
@pytest.mark.parametrize("family", ["opt", "gemma3", "bert"])
def test_in_bfloat16_a_step_differs_by_one_spacing_of_the_weights_at_most(tiny, padded, family, trainable):
    """2^-7 between 1 and 2: gradients that are summed in another order round to a neighbour. Whole batches: none."""
    model, batch = tiny(family, torch.bfloat16), _batch(padded)
    _, expected = _updates(FirstOrderClient, model, 3, trainable, batch)
    for micro_batch_size, allowed in ((None, 0.0 if trainable == "blocks" else 2**-7), (3, 2**-7)):
        _, found = _updates(RecomputingClient, model, 3, trainable, batch, micro_batch_size=micro_batch_size)
        assert max(float((found[name] - update).abs().max()) for name, update in expected.items()) <= allowed
    assert max(float(update.abs().max()) for update in expected.values()) > 4 * 2**-7


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "gemma3", "distilbert"])
def test_as_many_rows_as_positions_are_not_mistaken_for_each_other(tiny, padded, family):
    """A batch of 5 rows by 5: nothing but rows may be cut into micro-batches."""
    model, batch = tiny(family), _batch(padded, width=ROWS)
    _, expected = _updates(FirstOrderClient, model, 2, "all", batch)
    _, found = _updates(RecomputingClient, model, 2, "all", batch, micro_batch_size=2)
    _assert_same(found, expected, torch.float32)


@pytest.mark.parametrize("lowest", [1, 2])
def test_what_lies_below_the_lowest_trained_block_is_not_walked(tiny, padded, lowest):
    """Only the last layer of block 2, or of 1 and 2, requires a gradient: no block below is run a second time."""
    model, batch = tiny("opt", torch.float64), _batch(padded)
    halves = [_half(model, 3, "blocks") for _ in range(2)]
    for half in halves:
        for name, p in half.named_parameters():
            p.requires_grad_(name.endswith(("layers.2.fc2.weight", f"layers.{lowest}.fc2.weight")))
    ran = []
    for i, block in enumerate(halves[1].model.get_submodule(halves[1].blocks_name)):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    for client in (FirstOrderClient(halves[0]), RecomputingClient(halves[1], micro_batch_size=ROWS)):
        h = client.forward_for_backward(batch)
        client.backward(torch.ones_like(h), ETA)
    assert ran == [0, 1, 2, *range(2, lowest - 1, -1)]
    for (name, expected), (_, found) in zip(*(half.named_parameters() for half in halves), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=name)


def test_the_tables_of_embeddings_are_given_back_as_they_were(tiny, padded):
    half = _half(tiny("bert"), 1, "all")
    client = RecomputingClient(half)
    client.backward(torch.ones_like(client.forward_for_backward(_batch(padded))), ETA)
    assert not any(getattr(module, "sparse", False) for module in half.model.modules())
    assert not any(m._forward_pre_hooks for m in half.model.modules())
