"""Losses and scores from logits, for both kinds of targets. In float32 or better, whatever the model's dtype."""

import numpy as np
import torch
from torch.nn import functional as F

from hosl.core.array_types import Float, Int
from hosl.core.targets import ClassTargets, OptionTargets, Targets, scored_positions, scored_tokens


def wanted_positions(targets: Targets) -> torch.Tensor | None:
    """The sequence positions whose logits a loss needs, ascending, int64; None for a classification head."""
    if isinstance(targets, ClassTargets):
        return None
    return torch.from_numpy(scored_positions(targets))


def row_losses(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Negative log-likelihood of each row, [rows], nats: of its class, or of its option's tokens, mean per token.

    Args:
        logits: [rows, classes], or [rows, positions, vocabulary] at `wanted_positions(targets)`.
        targets: the targets of the same rows.
    """
    if isinstance(targets, ClassTargets):
        labels = torch.from_numpy(targets.labels).to(logits.device)
        return F.cross_entropy(widened(logits), labels, reduction="none")
    return -_option_log_likelihoods(logits, targets)


def mean_loss(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The loss of a batch, nats: the mean of `row_losses`, or the mean over all scored tokens (`mean_over`)."""
    if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
        return F.cross_entropy(widened(logits).flatten(0, 1), _token_grid(logits, targets).flatten())
    return row_losses(logits, targets).mean()


def weighed_losses(logits: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(sums, weights) of the rows, [rows] each: `mean_loss` of any rows is their sums' sum / their weights' sum.

    A row's sum is its loss in nats and its weight 1; where the mean is over tokens, the sum of its scored tokens'
    losses and their number.
    """
    if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
        grid = _token_grid(logits, targets)
        losses = F.cross_entropy(widened(logits).transpose(1, 2), grid, reduction="none")
        return losses.sum(dim=1), (grid != _NOT_SCORED).sum(dim=1).to(losses)
    losses = row_losses(logits, targets)
    return losses, torch.ones_like(losses)


def row_scores(logits: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
    """Log-probabilities per class [rows, classes], or of each row's option, mean per token [rows, 1].

    Where the mean is over tokens [rows, 2]: the second score is the number of tokens that the model ranks first.
    """
    if isinstance(targets, ClassTargets):
        return widened(logits).log_softmax(dim=-1).cpu().numpy()
    scores = _option_log_likelihoods(logits, targets)[:, None]
    if targets.mean_over == "tokens":
        right = (logits.argmax(-1) == _token_grid(logits, targets)).sum(dim=1, keepdim=True)
        scores = torch.cat([scores, right.to(scores)], dim=1)
    return scores.cpu().numpy()


def mean_loss_of_scored(logits: torch.Tensor, targets: OptionTargets) -> torch.Tensor:
    """`mean_loss`, where the mean is over tokens, from the logits of the scored tokens alone.

    Args:
        logits: [1, scored, vocabulary], row by row.
        targets: the targets.
    """
    return F.cross_entropy(widened(logits[0]), _tokens_row_by_row(logits, targets))


def row_scores_of_scored(logits: torch.Tensor, targets: OptionTargets) -> Float[np.ndarray, "rows scores"]:
    """`row_scores` [rows, 2], where the mean is over tokens, from logits as `mean_loss_of_scored` takes them."""
    tokens = _tokens_row_by_row(logits, targets)
    losses = F.cross_entropy(widened(logits[0]), tokens, reduction="none")
    right = (logits[0].argmax(-1) == tokens).to(losses)
    counts = (targets.tokens >= 0).sum(axis=1).tolist()
    rows = zip(losses.split(counts), right.split(counts), strict=True)
    return torch.stack([torch.stack([-of_row.mean(), hits.sum()]) for of_row, hits in rows]).cpu().numpy()


def _tokens_row_by_row(logits: torch.Tensor, targets: OptionTargets) -> torch.Tensor:
    tokens = scored_tokens(targets)
    return torch.from_numpy(tokens[tokens >= 0]).to(logits.device)


def _option_log_likelihoods(logits: torch.Tensor, targets: OptionTargets) -> torch.Tensor:
    if targets.mean_over == "tokens":
        sums, counts = weighed_losses(logits, targets)
        return -sums / counts
    scored = torch.from_numpy(targets.tokens >= 0).to(logits.device)
    tokens = torch.from_numpy(targets.tokens.astype(np.int64)).to(logits.device).clamp(min=0)
    rows = torch.arange(len(tokens), device=logits.device)[:, None]
    columns = torch.from_numpy(_columns(targets)).to(logits.device)
    at_tokens = widened(logits[rows, columns]).log_softmax(dim=-1)
    log_likelihoods = at_tokens.gather(-1, tokens[..., None])[..., 0]
    return (log_likelihoods * scored).sum(dim=1) / scored.sum(dim=1)


_NOT_SCORED = -100
"""The label that cross_entropy leaves out."""


def _token_grid(logits: torch.Tensor, targets: OptionTargets) -> torch.Tensor:
    """The right token of each of the logits, [rows, positions], int64; `_NOT_SCORED` elsewhere.

    A gather of the scored logits, as options have it, would hold a second copy of nearly all of them.
    """
    grid = np.full(logits.shape[:2], _NOT_SCORED, np.int64)
    rows, places = np.nonzero(targets.tokens >= 0)
    grid[rows, _columns(targets)[rows, places]] = targets.tokens[rows, places]
    return torch.from_numpy(grid).to(logits.device)


def _columns(targets: OptionTargets) -> Int[np.ndarray, "rows span"]:
    """The place of each scored position among `wanted_positions`, int64."""
    positions = scored_positions(targets)
    return np.searchsorted(positions, targets.positions).clip(max=len(positions) - 1)


def widened(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32 or better: half precision would round a loss to three digits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
