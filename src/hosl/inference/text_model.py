"""A model with its tokenizer: prompts in, answers out. No torch: the model may be elsewhere, half of it or all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

from hosl.errors import TaskError
from hosl.inference.answering import Answer, Ending, NextToken, answer, end_ids
from hosl.inference.decoding import Sampling
from hosl.tasks import TextTokenizer
from hosl.tasks.chat_template import ChatTemplate


@runtime_checkable
class Model(Protocol):
    """A model that can go on with texts, one after the other."""

    def text(self, most_tokens: int, candidates: int) -> AbstractContextManager[NextToken]:
        """The model for one text of at most `most_tokens` tokens, prompt included; what it keeps of it ends with it.

        `candidates` is the number of most probable tokens that it answers with; 0: all.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a person wants of the answers."""

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 128
    """The largest number of tokens of an answer."""
    stop: tuple[str, ...] = ()
    """The strings before which an answer is cut."""
    chat: bool = False
    """Whether a prompt is a user's message, put into the tokenizer's chat template."""


class TextModel:
    """A model that answers prompts."""

    def __init__(
        self,
        model: Model,
        tokenizer: TextTokenizer,
        folder: Path,
        wanted: Wanted,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Read what the model's folder says about the end of a text, and its chat template where it is wanted.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            folder: its folder, or that of its client half.
            wanted: what is wanted of the answers.
            say: is called with a line about an answer that has less room than wanted.

        Raises:
            TaskError: if there is no chat template, or a file is damaged.
        """
        self._model, self._tokenizer, self._wanted, self._say = model, tokenizer, wanted, say
        self._ends = end_ids(folder, tokenizer.token_id)
        self._chat = ChatTemplate.load(folder) if wanted.chat else None

    def answer(self, prompt: str, number: int, show: Callable[[str], None] = lambda piece: None) -> Answer:
        """The answer to a prompt.

        Args:
            prompt: its text, or a user's message.
            number: its number among the prompts of a command; keys the draws.
            show: is called with each piece of the answer as soon as it is certain.

        Raises:
            TaskError: if the prompt has no token, or more than the model reads.
        """
        ids = self._ids(prompt)
        ending = Ending(most_tokens=self._room(ids), end_ids=self._ends, stop=self._wanted.stop)
        sampling = self._wanted.sampling
        with self._model.text(len(ids) + ending.most_tokens, sampling.candidates) as next_token:
            made = answer(
                next_token, ids, ending, sampling, sampling.random(number), self._tokenizer.continuation(ids)
            )
            for piece in made:
                show(piece)
        return made

    def _ids(self, prompt: str) -> tuple[int, ...]:
        if self._chat is None:
            ids = self._tokenizer.encode_open(prompt)
        else:
            messages = [{"role": "user", "content": prompt}]
            ids = self._tokenizer.encode_as_is(self._chat.text(messages, answer_follows=True))
        vocabulary = self._tokenizer.limits.vocabulary
        if not ids:
            raise TaskError(
                f"the prompt {prompt!r} has no token for this model's tokenizer; write a longer one"
            )
        if vocabulary is not None and max(ids) >= vocabulary:
            raise TaskError(
                f"the prompt has the token id {max(ids)}, the model's table has {vocabulary} rows: this tokenizer "
                "belongs to another model"
            )
        return ids

    def _room(self, ids: tuple[int, ...]) -> int:
        positions, wanted = self._tokenizer.limits.positions, self._wanted.max_new_tokens
        if positions is None or len(ids) + wanted <= positions:
            return wanted
        if len(ids) >= positions:
            raise TaskError(
                f"the prompt has {len(ids):,} tokens, the model reads {positions:,}, the answer included; shorten it"
            )
        self._say(
            f"the model reads {positions:,} tokens, the prompt has {len(ids):,}: the answer has at most "
            f"{positions - len(ids):,}"
        )
        return positions - len(ids)
