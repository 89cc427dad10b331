"""The device's losses in numpy against torch's, for classes, options and texts."""

import numpy as np
import pytest
import torch

from hosl.core.targets import ClassTargets, OptionTargets, scored_positions
from hosl.parties.edge.loss import class_scores, loss_and_gradient_, loss_of, scored, token_scores
from hosl.parties.engine.loss import mean_loss, mean_loss_of_scored, row_scores, row_scores_of_scored

ROWS, SEQ, VOCABULARY = 4, 9, 23
LENGTHS = (1, 3, 2, 4)


def _targets(mean_over, random):
    tokens = np.full((ROWS, max(LENGTHS)), -1, np.int32)
    positions = np.zeros_like(tokens)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = random.integers(VOCABULARY, size=length)
        positions[row, :length] = np.sort(random.choice(SEQ, length, replace=False))
    return OptionTargets(np.ones((ROWS, SEQ), np.int8), positions, tokens, mean_over)


def _case(kind):
    """Targets, the logits that a trunk's states would give, and torch's loss and scores of them."""
    random = np.random.default_rng(3)
    if kind == "classes":
        targets = ClassTargets(np.ones((ROWS, SEQ), np.int8), random.integers(VOCABULARY, size=ROWS))
        shape, loss, scores = (ROWS, VOCABULARY), mean_loss, row_scores
    elif kind == "options":
        targets = _targets("rows", random)
        shape, loss, scores = (ROWS, len(scored_positions(targets)), VOCABULARY), mean_loss, row_scores
    else:
        targets = _targets("tokens", random)
        shape, loss, scores = (1, sum(LENGTHS), VOCABULARY), mean_loss_of_scored, row_scores_of_scored
    return targets, (random.standard_normal(shape) * 4).astype(np.float32), loss, scores


@pytest.mark.parametrize("kind", ["classes", "options", "texts"])
def test_losses_gradients_and_scores_are_torchs(kind):
    targets, logits, torch_loss, torch_scores = _case(kind)
    of = scored(targets)
    leaf = torch.from_numpy(logits).double().requires_grad_()
    loss = torch_loss(leaf, targets)
    (gradient,) = torch.autograd.grad(loss, leaf)

    at = (of.rows,) if kind == "classes" else (of.rows, of.columns)
    mine = logits[at].copy()
    assert loss_of(mine, of) == pytest.approx(loss.item(), rel=1e-6)
    np.testing.assert_array_equal(mine, logits[at])
    wanted = torch_scores(leaf.detach(), targets)
    pieces = (mine[start : start + 3] for start in range(0, len(mine), 3))
    scores = class_scores(mine) if kind == "classes" else token_scores(pieces, targets, of)
    np.testing.assert_allclose(scores, wanted, rtol=2e-6, atol=2e-6)

    assert loss_and_gradient_(mine, of) == pytest.approx(loss.item(), rel=1e-6)
    whole = np.zeros_like(logits)
    whole[at] = mine
    np.testing.assert_allclose(whole, gradient.numpy(), atol=1e-7)


def test_large_logits_overflow_nothing():
    targets = ClassTargets(np.ones((1, 2), np.int8), np.array([1]))
    logits = np.array([[1e4, 1e4 - 2]], np.float32)
    expected = np.log1p(np.exp(2.0))
    assert loss_of(logits, scored(targets)) == pytest.approx(expected, rel=1e-6)
    assert loss_and_gradient_(logits, scored(targets)) == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(logits).all()
