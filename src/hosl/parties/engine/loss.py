"""Losses and scores from logits, for both kinds of targets. In float32 or better, whatever the model's dtype."""

import numpy as np
import torch
from torch.nn import functional as F

from hosl.core.array_types import Float
from hosl.core.targets import ClassTargets, OptionTargets, Targets, positions_of


def wanted_positions(targets: Targets) -> torch.Tensor | None:
    """The sequence positions whose logits a loss needs, ascending, int64; None for a classification head."""
    if isinstance(targets, ClassTargets):
        return None
    return torch.from_numpy(positions_of(targets).positions)


def row_losses(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Negative log-likelihood of each row, [rows], nats: of its class, or of its option's tokens, mean per token.

    Args:
        logits: [rows, classes], or [rows, positions, vocabulary] at `wanted_positions(targets)`.
        targets: the targets of the same rows.
    """
    if isinstance(targets, ClassTargets):
        labels = torch.from_numpy(targets.labels).to(logits.device)
        return F.cross_entropy(_widened(logits), labels, reduction="none")
    return -_option_log_likelihoods(logits, targets)


def row_scores(logits: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
    """Log-probabilities per class [rows, classes], or of each row's option, mean per token [rows, 1]."""
    if isinstance(targets, ClassTargets):
        return _widened(logits).log_softmax(dim=-1).cpu().numpy()
    return _option_log_likelihoods(logits, targets)[:, None].cpu().numpy()


def _option_log_likelihoods(logits: torch.Tensor, targets: OptionTargets) -> torch.Tensor:
    scored = torch.from_numpy(targets.tokens >= 0).to(logits.device)
    tokens = torch.from_numpy(targets.tokens.astype(np.int64)).to(logits.device).clamp(min=0)
    positions = positions_of(targets).positions
    columns = np.searchsorted(positions, targets.positions).clip(max=len(positions) - 1)
    rows = torch.arange(len(tokens), device=logits.device)[:, None]
    at_tokens = _widened(logits[rows, torch.from_numpy(columns).to(logits.device)]).log_softmax(dim=-1)
    log_likelihoods = at_tokens.gather(-1, tokens[..., None])[..., 0]
    return (log_likelihoods * scored).sum(dim=1) / scored.sum(dim=1)


def _widened(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
