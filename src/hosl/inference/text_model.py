"""A model with its tokenizer: prompts in, answers out. No torch: the model may be elsewhere, half of it or all."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol, runtime_checkable

from hosl.errors import TaskError
from hosl.inference.answering import Answer, Ending, NextToken, answer, end_ids
from hosl.inference.decoding import Sampling
from hosl.tasks import TextTokenizer
from hosl.tasks.chat_template import ChatTemplate
from hosl.tasks.sft.formats import Chat


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
    chat_template: Path | None = None
    """A file with a chat template in place of the tokenizer's own."""


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
        self._ends, self._folder = end_ids(folder, tokenizer.token_id), folder
        if wanted.chat:
            _ = self._template

    def answer(
        self, prompt: str | Chat, number: int, show: Callable[[str], None] = lambda piece: None
    ) -> Answer:
        """The answer to a prompt.

        Args:
            prompt: its text, a user's message, or a chat that the assistant is to go on with.
            number: its number among the prompts of a command; keys the draws.
            show: is called with each piece of the answer as soon as it is certain.

        Raises:
            TaskError: if the prompt has no token, or more than the model reads.
        """
        ids = self._ids(prompt)
        room = self._room(ids)
        if room < self._wanted.max_new_tokens:
            self._say(
                f"the model reads {len(ids) + room:,} tokens, the prompt has {len(ids):,}: the answer has at most "
                f"{room:,}"
            )
        ending = Ending(most_tokens=room, end_ids=self._ends, stop=self._wanted.stop)
        sampling = self._wanted.sampling
        with self._model.text(len(ids) + ending.most_tokens, sampling.candidates) as next_token:
            made = answer(
                next_token, ids, ending, sampling, sampling.random(number), self._tokenizer.continuation(ids)
            )
            for piece in made:
                show(piece)
        return made

    def room(self, prompt: str | Chat) -> int:
        """The largest number of tokens that the answer to a prompt may have.

        Raises:
            TaskError: as `answer` does, before anything is computed.
        """
        return self._room(self._ids(prompt))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate.load(self._folder, self._wanted.chat_template)

    def _ids(self, prompt: str | Chat) -> tuple[int, ...]:
        if isinstance(prompt, str) and self._wanted.chat:
            prompt = Chat([{"role": "user", "content": prompt}])
        if isinstance(prompt, Chat):
            text = self._template.text(prompt.messages, answer_follows=True, tools=prompt.tools)
            ids = self._tokenizer.encode_as_is(text)
        else:
            ids = self._tokenizer.encode_open(prompt)
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
        return positions - len(ids)
