"""Tokens rebuilt from activations, position by position: by the nearest embedding, and by ridge regression.

The attacker has the public model, which the client's half is a part of, and text of its own. Each attack may choose
between variants; it does so by what it rebuilds of that text, never of the text under attack.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

_AT_ONCE = 256
"""The positions whose scores against the whole vocabulary are held at a time."""
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
"""The strengths of ridge regression that are tried, of standardised activations."""
_HELD_OUT = 5
"""One of so many positions of the attacker's own text decides between variants of an attack that is fitted."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What a server gets of some texts, and what they are, to score an attack or to fit one."""

    states: torch.Tensor
    """[positions, width], float32: activations of all rows, below each other."""
    tokens: torch.Tensor
    """[positions], int64."""
    lengths: tuple[int, ...]
    """The positions of each row."""


Ranking = Callable[[torch.Tensor, int], torch.Tensor]
"""(states [positions, width], k) -> the k most probable tokens of each, [positions, k], int64, the first one best."""


def nearest(table: torch.Tensor, own: Seen) -> Ranking:
    """The attack that takes the embedding with the largest cosine.

    Activations and embeddings are taken as they are, or both less their means, whichever does better on `own`.

    Args:
        table: [vocabulary, width], the embeddings of all tokens.
        own: the attacker's own text.
    """
    none = torch.zeros(table.shape[1])
    variants = [
        _cosines(table, none, lambda states: states),
        _cosines(table, table.mean(0), lambda states: states - own.states.mean(0)),
    ]
    return max(variants, key=lambda ranking: share(ranking(own.states, 1)[:, 0], own.tokens))


def ridge(table: torch.Tensor, own: Seen) -> Ranking:
    """The attack that learns a linear map from activations to embeddings on `own`, then takes the nearest embedding.

    Args:
        table: [vocabulary, width].
        own: the attacker's own text; a fifth of its positions chooses the strength of the regularisation.
    """
    held = torch.arange(len(own.tokens)) % _HELD_OUT == 0
    rest = ~held

    def fitted(some: torch.Tensor, strength: float) -> Ranking:
        return _regressed(table, own.states[some], own.tokens[some], strength)

    best = max(
        _STRENGTHS,
        key=lambda strength: share(fitted(rest, strength)(own.states[held], 1)[:, 0], own.tokens[held]),
    )
    return fitted(torch.ones_like(held), best)


def better(table: torch.Tensor, own: Seen) -> Ranking:
    """The attack of the two that finds more in text that it was not fitted on, a fifth of `own`; then fitted on all."""
    held = torch.arange(len(own.tokens)) % _HELD_OUT == 0
    rest, some = (Seen(own.states[of], own.tokens[of], ()) for of in (~held, held))

    def found(make: Callable[[torch.Tensor, Seen], Ranking]) -> float:
        return share(make(table, rest)(some.states, 1)[:, 0], some.tokens)

    return max((nearest, ridge), key=found)(table, own)


def share(found: torch.Tensor, tokens: torch.Tensor) -> float:
    """The share of positions whose token was found; 0 of none."""
    return float((found == tokens).float().mean()) if len(tokens) else 0.0


def _regressed(table: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor, strength: float) -> Ranking:
    middle, scale = spread(states)
    x = ((states - middle) / scale).double()
    y = (table[tokens] - table.mean(0)).double()
    squares = x.T @ x / len(x) + strength * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(squares, x.T @ y / len(x)).float()
    return _cosines(table, table.mean(0), lambda some: ((some - middle) / scale) @ weights)


def spread(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the standard deviation of each number of an activation, [width] each; a constant has deviation 1."""
    deviation = states.std(0, correction=0)
    return states.mean(0), torch.where(deviation > 0, deviation, 1.0)


def _cosines(
    table: torch.Tensor, middle: torch.Tensor, prepared: Callable[[torch.Tensor], torch.Tensor]
) -> Ranking:
    embeddings = F.normalize(table - middle, dim=-1)

    def ranking(states: torch.Tensor, k: int) -> torch.Tensor:
        parts: Sequence[torch.Tensor] = [
            (F.normalize(prepared(some), dim=-1) @ embeddings.T).topk(k, dim=-1).indices
            for some in states.split(_AT_ONCE)
        ]
        return torch.cat(parts)

    return ranking


def right_padded(rows: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) of rows of tokens, [rows, longest] each, int64."""
    ids = pad_sequence(list(rows), batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
