"""One prompt's answer, token by token: where it ends, and the text that may be shown meanwhile. No torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from hosl.errors import ConfigError
from hosl.inference.decoding import Candidates, Sampling, choose
from hosl.tasks.model_settings import model_settings, token_text

End = Literal["end of text", "stop string", "length"]


NextToken: TypeAlias = Callable[[Sequence[int]], Candidates]
"""A model that goes on with one text: the candidates for the token after these ids, which follow those before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Where an answer ends."""

    most_tokens: int
    """The largest number of tokens; at least 1."""
    end_ids: frozenset[int] = frozenset()
    """The tokens that end a text; none of them is part of it."""
    stop: tuple[str, ...] = ()
    """The strings before which an answer is cut."""

    def __post_init__(self) -> None:
        if self.most_tokens < 1:
            raise ConfigError(
                f"an answer has at least 1 token, got {self.most_tokens}; raise --max-new-tokens"
            )
        if "" in self.stop:
            raise ConfigError("a stop string has 1 character or more, one is empty; leave that --stop out")


@dataclass
class Answer:
    """One answer. Iterating over it generates: it yields the pieces of text as they become certain."""

    pieces: Iterator[str]
    text: str = ""
    """The text so far, without a stop string."""
    tokens: list[int] = field(default_factory=list)
    """The tokens so far, without the one that ends a text."""
    end: End = "length"
    """Why it ended; certain once all pieces were read."""

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def whole(self) -> "Answer":
        """This answer, generated to its end."""
        for _ in self.pieces:
            pass
        return self


def answer(
    next_token: NextToken,
    prompt: Sequence[int],
    ending: Ending,
    sampling: Sampling,
    random: "np.random.Generator",
    decode: Callable[[int], str],
) -> Answer:
    """The answer to a prompt, generated while its pieces are read.

    Args:
        next_token: the model.
        prompt: the prompt's token ids, at least one.
        ending: where the answer ends.
        sampling: how tokens are chosen.
        random: the generator of this text's draws.
        decode: maps each token in turn to the text that it makes certain; holds back half a character.
    """

    def pieces() -> Iterator[str]:
        new, held = list(prompt), ""
        while len(made.tokens) < ending.most_tokens:
            token = choose(next_token(new), sampling, random)
            if token in ending.end_ids:
                made.end = "end of text"
                break
            made.tokens.append(token)
            new, held = [token], held + decode(token)
            if (found := _first(held, ending.stop)) is not None:
                held, made.end = held[:found], "stop string"
                break
            certain = len(held) - _may_begin(held, ending.stop)
            if certain:
                made.text, piece, held = made.text + held[:certain], held[:certain], held[certain:]
                yield piece
        if held:
            made.text += held
            yield held

    made = Answer(pieces=iter(()))
    made.pieces = pieces()
    return made


def _first(text: str, stop: Iterable[str]) -> int | None:
    """The place of the first stop string in a text; None: there is none."""
    return min((place for string in stop if (place := text.find(string)) >= 0), default=None)


def _may_begin(text: str, stop: Iterable[str]) -> int:
    """The length of the longest end of a text that begins a stop string."""
    return max(
        (size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0
    )


def end_ids(folder: Path, token_id: Callable[[str], int | None]) -> frozenset[int]:
    """The tokens that end a text, as a model's folder says; none where it does not.

    The first that says it counts: generation_config.json, as transformers reads it, config.json, the tokenizer's own
    end-of-text token.

    Args:
        folder: a model's folder, or a client half's.
        token_id: the id of a token of the tokenizer.

    Raises:
        TaskError: if one of these files is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        settings = model_settings(folder, name)
        nested = settings.get("text_config")
        for found in (settings, nested if isinstance(nested, dict) else {}):
            ids = found.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if known := frozenset(i for i in ids if isinstance(i, int) and not isinstance(i, bool)):
                return known
    token = token_text(model_settings(folder, "tokenizer_config.json").get("eos_token"))
    last = None if token is None else token_id(token)
    return frozenset() if last is None else frozenset({last})
