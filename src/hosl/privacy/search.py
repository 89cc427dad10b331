"""Tokens of a causal model rebuilt from activations by search: left to right, each guess checked in the half itself.

In a causal model the activation of a position depends on no later token. So whoever has the half and knows the tokens
before a position can try tokens there until the activation is the one that was sent; and as different texts hardly ever
have the same activation, what fits is the text. Candidates come from another attack first, then from the gradient of
the squared distance at the embedding of the best one so far, which says where a better embedding lies, and, of an
attacker who has the whole language model, from what that model expects after the text so far.
Source of the idea: SipIt, "Language Models are Injective and Hence Invertible" (arXiv 2510.15511).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from hosl.errors import NonFiniteError
from hosl.privacy.expectation import Expectation
from hosl.privacy.inversion import Ranking, Seen, right_padded, spread

_CANDIDATES = 8
"""The tokens that are tried from one ranking, or along the first gradient."""
_AT_ONCE = 256
"""The most tokens of one row, and texts of all rows, that are checked at once."""
TRIES = 64
"""The tokens that are tried at a position by default."""
_ROWS = 64
"""The rows that are searched at a time."""
_AHEAD = 8
"""The positions that are checked at once: where guesses are right, several are settled by one check."""
CLOSE = 0.05
"""The distance at which a guess is taken for the token, in standard deviations of activations: beyond what int8 on the
wire or float32 on another machine changes, far below that of another token."""


@dataclass(eq=False)
class _Frontier:
    """The search at one position of a row; everything before it is settled."""

    position: int
    queue: list[int]
    """The candidates that come next."""
    tried: set[int] = field(default_factory=set)
    best: tuple[float, int] = (float("inf"), -1)
    """The least distance, and its token."""
    expected: Sequence[int] = ()
    """The tokens that a language model expects here, most probable first; empty: it was not asked."""

    def tell(self, token: int, distance: float) -> None:
        """Take note of a guess that was checked."""
        self.tried.add(token)
        self.best = min(self.best, (distance, token))
        self.queue = [other for other in self.queue if other not in self.tried]


class Search:
    """The search with one half; it holds no gradients of weights."""

    def __init__(
        self,
        half: Any,
        table: torch.Tensor,
        own: Seen,
        *,
        tries: int = TRIES,
        expectation: Expectation | None = None,
    ) -> None:
        """Prepare an attack on activations of `half`.

        Args:
            half: the `ClientHalf` of a causal model, as the attacker has it.
            table: [vocabulary, width], the embeddings of all tokens, as its embedding layer returns them.
            own: the attacker's own text, by which distances are scaled.
            tries: the tokens that are tried at a position before the nearest one is taken.
            expectation: that of the whole public model, which then gives half of the candidates after the first.
        """
        self._half, self._table, self._tries = half, table, min(tries, len(table))
        self._expectation = expectation
        _, self._scale = spread(own.states)

    def found(
        self, seen: Seen, ranking: Ranking, say: Callable[[int, int], None] = lambda done, of: None
    ) -> torch.Tensor:
        """The tokens of all rows, [positions], of which `seen` gives the activations alone.

        Args:
            seen: what the server got; its tokens are not read.
            ranking: the attack that gives the first candidates.
            say: is called with the positions that are settled, and all of them.

        Raises:
            NonFiniteError: if an activation is NaN or infinite.
        """
        if not bool(torch.isfinite(seen.states).all()):
            raise NonFiniteError(
                "the activations are NaN or infinite: this half computes nothing that can be attacked"
            )
        pieces, lengths, done = list[torch.Tensor](), list(seen.lengths), 0
        for first in range(0, len(lengths), _ROWS):
            some = lengths[first : first + _ROWS]
            states = seen.states[done : done + sum(some)]
            pieces.append(self._found(states, some, ranking, partial(_beyond, say, done, len(seen.tokens))))
            done += sum(some)
        return torch.cat(pieces)

    def _found(
        self, sent: torch.Tensor, lengths: list[int], ranking: Ranking, say: Callable[[int], None]
    ) -> torch.Tensor:
        wanted = sent.split(lengths)
        ranked = ranking(sent, min(_CANDIDATES, self._tries)).split(lengths)
        guesses = [of_row[:, 0].clone() for of_row in ranked]
        open_at = {row: _Frontier(0, of_row[0].tolist()) for row, of_row in enumerate(ranked)}
        while open_at:
            checked = {row: self._texts(open_at[row], guesses[row]) for row in open_at}
            together = [text for texts in checked.values() for text in texts]
            found = iter(self._distances(together, [wanted[row] for row in checked for _ in checked[row]]))
            for row, texts in checked.items():
                distances = [next(found) for _ in texts]
                frontier = self._advanced(open_at[row], guesses[row], texts, distances, ranked[row])
                if frontier is None:
                    del open_at[row]
                else:
                    open_at[row] = frontier
            self._refill({row: open_at[row] for row in open_at if not open_at[row].queue}, guesses, wanted)
            for row, frontier in open_at.items():
                guesses[row][frontier.position] = frontier.queue[0]
            left = sum(len(guesses[row]) - frontier.position for row, frontier in open_at.items())
            say(len(sent) - left)
        return torch.cat(guesses)

    def _texts(self, frontier: _Frontier, guess: torch.Tensor) -> list[torch.Tensor]:
        """What is checked next of a row: its guess, which may be right further on, too; then all candidates at once."""
        at = frontier.position
        if not frontier.tried:
            return [guess[: at + _AHEAD].clone()]
        return [torch.cat([guess[:at], guess.new_tensor([token])]) for token in frontier.queue]

    def _advanced(
        self,
        frontier: _Frontier,
        guess: torch.Tensor,
        texts: Sequence[torch.Tensor],
        checked: Sequence[torch.Tensor],
        ranked: torch.Tensor,
    ) -> _Frontier | None:
        """The frontier after a check of the row's texts; None: the row is settled."""
        at, distances = frontier.position, checked[0]
        for text, of_text in zip(texts[1:], checked[1:], strict=True):
            frontier.tell(int(text[at]), float(of_text[at]))
        while True:
            at = frontier.position
            frontier.tell(int(guess[at]), float(distances[at]))
            if frontier.best[0] > CLOSE and len(frontier.tried) < self._tries:
                return frontier
            changed = int(guess[at]) != frontier.best[1]
            guess[at] = frontier.best[1]
            if at + 1 == len(guess):
                return None
            frontier = _Frontier(at + 1, ranked[at + 1].tolist())
            # what stands after it was checked after another token, or was not checked yet
            if changed or at + 1 == len(distances):
                return frontier

    def _refill(
        self, dry: dict[int, _Frontier], guesses: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> None:
        """Give frontiers without candidates the embeddings nearest to where the gradient points from the best one.

        Where a language model is at hand, half of them are those that it expects.
        """
        if not dry:
            return
        rows = list(dry)
        texts = []
        for row, frontier in dry.items():
            text = guesses[row][: frontier.position + 1].clone()
            text[-1] = frontier.best[1]
            texts.append(text)
        gradients, squares = self._gradients(texts, [wanted[row] for row in rows])
        self._ask({row: guesses[row][: dry[row].position] for row in rows}, dry)
        for row, gradient, square in zip(rows, gradients, squares, strict=True):
            frontier = dry[row]
            # the step at whose end the distance would be 0, were it as the gradient says all along (Polyak)
            target = (
                self._table[frontier.best[1]] - square / gradient.square().sum().clamp(min=1e-30) * gradient
            )
            away = (self._table - target).square().sum(1)
            away[list(frontier.tried)] = float("inf")
            # as many again as were tried: the longer it takes, the less a gradient says
            wanted_now = min(max(_CANDIDATES, len(frontier.tried)), _AT_ONCE)
            untried = min(wanted_now, self._tries - len(frontier.tried))
            near = away.topk(untried, largest=False).indices.tolist()
            likely = [token for token in frontier.expected if token not in frontier.tried]
            frontier.queue = list(dict.fromkeys([*likely[: (untried + 1) // 2], *near]))[:untried]

    def _ask(self, texts: dict[int, torch.Tensor], dry: dict[int, _Frontier]) -> None:
        """Ask the language model once for each frontier, of what stands before it."""
        asked = [row for row in texts if not dry[row].expected]
        if self._expectation is None or not asked:
            return
        scores = self._expectation([texts[row] for row in asked])
        for row, likely in zip(asked, scores.topk(self._tries).indices.tolist(), strict=True):
            dry[row].expected = likely

    def _distances(self, texts: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The distance of each position's activation to the one that was sent, in standard deviations."""
        distances = list[torch.Tensor]()
        for first in range(0, len(texts), _AT_ONCE):
            some = texts[first : first + _AT_ONCE]
            with torch.no_grad():
                states = self._half(*right_padded(some))
            distances += [
                ((h[: len(text)] - want[: len(text)]) / self._scale).square().mean(-1).sqrt()
                for h, text, want in zip(states, some, wanted[first : first + _AT_ONCE], strict=True)
            ]
        return distances

    def _gradients(
        self, texts: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each text's last position: half the squared distance [rows], and its gradient at the embedding there."""
        taken: list[torch.Tensor] = []

        def take(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            taken.append(embedded.detach().requires_grad_())
            return taken[0]

        hook = self._half.model.get_input_embeddings().register_forward_hook(take)
        try:
            with torch.enable_grad():
                states = self._half(*right_padded(texts))
                ends = [len(text) - 1 for text in texts]
                last = torch.stack([h[end] for h, end in zip(states, ends, strict=True)])
                sent = torch.stack([want[end] for want, end in zip(wanted, ends, strict=True)])
                squares = ((last - sent) / self._scale).square().sum(-1) / 2
                (gradient,) = torch.autograd.grad(squares.sum(), taken[0])
        finally:
            hook.remove()
        return gradient[torch.arange(len(texts)), torch.tensor(ends)], squares.detach()


def _beyond(say: Callable[[int, int], None], before: int, of: int, settled: int) -> None:
    say(before + settled, of)
