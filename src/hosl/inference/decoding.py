"""The next token from a model's logits: the most probable one, or one drawn by temperature, top-k and top-p. No torch.

A model hands over its candidates: all tokens, or the most probable ones, as many as the choice needs. So a server can
answer with a few numbers, and the device still chooses by the same function, from the same numbers.
"""

from dataclasses import dataclass

import numpy as np

from hosl.core.array_types import Float, Int
from hosl.errors import ConfigError, NonFiniteError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The choice of the next token; by default the most probable one."""

    temperature: float = 0.0
    """The divisor of the logits before the softmax; 0: the most probable token, always."""
    top_p: float = 1.0
    """The most probable tokens are kept until their probabilities sum up to this; 1: all."""
    top_k: int = 0
    """The number of most probable tokens that are kept, before top_p; 0: all."""
    seed: int = 0
    """The seed of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"temperature must be 0 (the most probable token) or more, got {self.temperature}"
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must lie in (0, 1], got {self.top_p}; 1 keeps every token")
        if self.top_k < 0 or self.seed < 0:
            raise ConfigError(f"top-k and seed must be 0 or more, got {self.top_k} and {self.seed}")

    @property
    def unused(self) -> list[str]:
        """The names of what was asked for and changes nothing: at temperature 0 nothing is drawn."""
        asked = {"top-p": self.top_p != 1, "top-k": self.top_k != 0, "seed": self.seed != 0}
        return [name for name, is_asked in asked.items() if is_asked and self.temperature == 0]

    @property
    def candidates(self) -> int:
        """The number of most probable tokens that the choice needs; 0: all."""
        return 1 if self.temperature == 0 else self.top_k

    def random(self, text: int) -> "np.random.Generator":
        """The generator of the draws of one text, by its number; one draw a token."""
        return np.random.Generator(np.random.Philox(key=[self.seed % 2**64, text]))


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Tokens that may come next, the most probable first, and of equal ones the one with the smaller id."""

    tokens: Int[np.ndarray, " candidates"]
    """int64."""
    logits: Float[np.ndarray, " candidates"]
    """float32."""


def most_probable(logits: Float[np.ndarray, " vocabulary"], count: int) -> Candidates:
    """The `count` most probable tokens; 0: all.

    Raises:
        NonFiniteError: if a logit is NaN, or the largest is infinite: the model has diverged.
    """
    largest = logits.max()
    if not np.isfinite(largest):
        raise NonFiniteError(f"the model's largest logit is {largest}: its weights have diverged in training")
    if count == 1:
        tokens = np.array([logits.argmax()])
    elif 0 < count < len(logits):
        least = np.partition(logits, -count)[-count]
        tokens = np.flatnonzero(logits >= least)
        tokens = tokens[np.argsort(-logits[tokens], kind="stable")][:count]
    else:
        tokens = np.argsort(-logits, kind="stable")
    return Candidates(tokens.astype(np.int64), logits[tokens].astype(np.float32))


def distribution(
    candidates: Candidates, sampling: Sampling
) -> tuple[Int[np.ndarray, " kept"], Float[np.ndarray, " kept"]]:
    """The tokens that may be drawn and their probabilities, float64. Requires: a temperature above 0."""
    kept = slice(0, sampling.top_k or None)
    below = candidates.logits[kept].astype(np.float64)
    below -= below[0]
    with np.errstate(over="ignore"):  # at a temperature near 0 all but the first are infinitely far below it
        probabilities = np.exp(below / sampling.temperature)
    probabilities /= probabilities.sum()
    before = np.cumsum(probabilities) - probabilities
    # the first is kept in any case, the others while what is before them sums up to less than top_p
    count = max(int((before < sampling.top_p).sum()), 1)
    return candidates.tokens[kept][:count], probabilities[:count] / probabilities[:count].sum()


def choose(candidates: Candidates, sampling: Sampling, random: "np.random.Generator") -> int:
    """The next token; makes one draw unless the temperature is 0."""
    if sampling.temperature == 0:
        return int(candidates.tokens[0])
    tokens, probabilities = distribution(candidates, sampling)
    place = int(np.searchsorted(np.cumsum(probabilities), random.random(), side="right"))
    return int(tokens[min(place, len(tokens) - 1)])
