"""A row -> its token ids and the spans of them that are learned, cut to max_tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from hosl.errors import TaskError
from hosl.tasks.base import Example
from hosl.tasks.chat_template import ChatTemplate
from hosl.tasks.encoding import Encoder
from hosl.tasks.sft.formats import Chat, Completion, SftRow, Text
from hosl.tasks.tokenizer import TextTokenizer

LossOn: TypeAlias = Literal["completion", "assistant", "all"]
Span: TypeAlias = tuple[int, int]


class RowEncoder:
    """The rows of a task as examples, and the count of what is said about them."""

    def __init__(
        self, tokenizer: TextTokenizer, encoder: Encoder, loss_on: LossOn | None, template_file: Path | None
    ) -> None:
        """Encode nothing yet.

        Args:
            tokenizer: the model's.
            encoder: holds max_tokens, and counts what is cut.
            loss_on: the tokens that are learned; None: by the format of the row.
            template_file: a chat template in place of the tokenizer's own.
        """
        self._tokenizer, self._encoder, self._loss_on = tokenizer, encoder, loss_on
        self._template_file = template_file
        self.cut_answers = 0
        """The rows whose answer alone is more than max_tokens allows."""
        self.ended = 0
        """The rows that got the token that ends a text."""
        self._opening = tokenizer.encode_open("")

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template, read when the first chat wants it.

        Raises:
            TaskError: if there is none.
        """
        if self._tokenizer.folder is None and self._template_file is None:
            raise TaskError("this tokenizer has no chat template; name a file in task.chat_template")
        return ChatTemplate.load(self._tokenizer.folder or Path(), self._template_file)

    def example(self, row: SftRow) -> Example:
        """The encoded row.

        Raises:
            TaskError: naming the row, if its template fails, its prompt leaves no room, or nothing in it is learned.
        """
        try:
            encoded = self._encoded(row.content)
            if not encoded.spans or encoded.spans[-1][1] < 2:
                raise TaskError("it has no token that could be predicted; drop the row")
            return self._cut(encoded)
        except TaskError as cause:
            raise TaskError(f"{row.where}: {cause}") from None

    def loss_on(self, content: Text | Completion | Chat) -> LossOn:
        """The tokens of a row that are learned.

        Raises:
            TaskError: if the setting wants tokens that such a row does not have.
        """
        allowed = _learnable(content)
        if self._loss_on is None:
            return allowed[0]
        if self._loss_on not in allowed:
            raise TaskError(
                f"task.loss_on: {self._loss_on} means nothing for such a row; allowed: {', '.join(allowed)}"
            )
        return self._loss_on

    def _encoded(self, content: Text | Completion | Chat) -> "_Encoded":
        loss_on = self.loss_on(content)
        match content:
            case Chat():
                return self._chat(content, loss_on)
            case Text():
                ids = self._ended(self._tokenizer.encode_open(content.text))
                return _Encoded(ids, [(1, len(ids))], answers=[])
            case Completion():
                whole, prompt = content.prompt + content.completion, len(content.prompt)
                ids, places = self._tokenizer.located(whole, as_is=False)
                start = max(1, _tokens_of(places, prompt, len(whole))[0])
                ids = self._ended(ids)
                first = start if loss_on == "completion" else 1
                return _Encoded(ids, [(first, len(ids))], answers=[(start, len(ids))])

    def _ended(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        eos = self._tokenizer.eos_id
        if eos is None or (ids and ids[-1] == eos):
            return ids
        self.ended += 1
        return (*ids, eos)

    def _chat(self, chat: Chat, loss_on: LossOn) -> "_Encoded":
        if loss_on == "all":
            text = self.template.text(chat.messages, answer_follows=False, tools=chat.tools)
            ids = self._tokenizer.encode_as_is(text)
            return _Encoded(ids, [(1, len(ids))], answers=[])
        if self.template.marks_answers:
            text, found = self.template.answers(chat.messages, tools=chat.tools)
            if loss_on == "completion" and chat.prompt:
                before = self.template.answers(chat.messages[: chat.prompt], tools=chat.tools)[1]
                found = found[len(before) :]
        else:
            text, found = self._turns(chat, loss_on)
        ids, places = self._tokenizer.located(text, as_is=True)
        spans = [_tokens_of(places, start, self._turn_end(text, start, stop)) for start, stop in found]
        spans = [(max(start, 1), stop) for start, stop in spans if stop > max(start, 1)]
        return _Encoded(ids, spans, answers=spans)

    def _turns(self, chat: Chat, loss_on: LossOn) -> tuple[str, list[Span]]:
        """The text of a chat and the characters of its answers, found by the texts of its beginnings.

        Raises:
            TaskError: if the template writes the beginning of a chat otherwise once it goes on.
        """
        messages, text = chat.messages, ""
        whole = self.template.text(messages, answer_follows=False, tools=chat.tools)
        spans: list[Span] = []
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if loss_on == "completion":
            places = [place for place in places if place >= (chat.prompt or 0)]
        for place in places:
            after_answer = place > 0 and messages[place - 1]["role"] == "assistant"
            before = self.template.text(messages[:place], answer_follows=not after_answer, tools=chat.tools)
            text = self.template.text(messages[: place + 1], answer_follows=False, tools=chat.tools)
            for part in (before, text):
                if not whole.startswith(part):
                    raise TaskError(
                        f"the chat template writes the first {place + 1} messages otherwise once the chat goes on, so "
                        "that the assistant's tokens cannot be told from the others; set task.loss_on: all, or name a "
                        "template with {% generation %} in task.chat_template"
                    )
            if len(text) > len(before):
                spans.append((len(before), len(text)))
        return whole, spans

    def _turn_end(self, text: str, start: int, stop: int) -> int:
        """The end of an answer: after the token that ends its turn, before the line break that a template adds."""
        written = text[start:stop].rstrip()
        return start + len(written) if written.endswith(self._tokenizer.special_texts) else stop

    def _cut(self, row: "_Encoded") -> Example:
        """The row within max_tokens; what follows the last span is left out, no loss depends on it.

        Of a text the end is cut, of a prompt or a chat the beginning. An answer that is too long alone loses its end,
        its prompt then keeps at most half of the row.

        Raises:
            TaskError: if what stands before the first answer is as long as max_tokens.
        """
        whole, spans, limit = row.ids[: row.spans[-1][1]], row.spans, self._encoder.max_tokens
        kept = whole
        if len(whole) > limit and not row.answers:
            kept, spans = whole[:limit], [(start, min(stop, limit)) for start, stop in spans if start < limit]
        elif len(whole) > limit:
            kept, spans = self._cut_left(whole, spans, row.answers)
        return Example(rows=(self._encoder.counted(whole, kept),), scored=tuple(spans))

    def _cut_left(
        self, whole: tuple[int, ...], spans: Sequence[Span], answers: Sequence[Span]
    ) -> tuple[tuple[int, ...], list[Span]]:
        prompt, limit = answers[0][0], self._encoder.max_tokens
        if prompt >= limit:
            raise TaskError(
                f"the prompt has {prompt:,} tokens, max_tokens is {limit:,}: there is no room for an answer; raise "
                "task.max_tokens, or drop the row"
            )
        opening = len(self._opening) if whole[: len(self._opening)] == self._opening else 0
        (start, stop), room = answers[-1], limit - opening
        before = room - (stop - start)
        if before < 1:
            self.cut_answers += 1
            before = min(start - opening, room // 2)
        seam = start - before
        cut = seam - opening
        kept = (*whole[:opening], *whole[seam : seam + room])
        # the token at the seam is not learned: what stood before it is gone
        moved = [
            (s - cut if s > seam or s == start else opening + 1, min(e - cut, len(kept))) for s, e in spans
        ]
        return kept, [(s, e) for s, e in moved if s < e]


@dataclass(frozen=True)
class _Encoded:
    """A row before it is cut."""

    ids: tuple[int, ...]
    spans: list[Span]
    """The tokens that are learned."""
    answers: list[Span]
    """The answers, of which a cut keeps the last and not what stands before it; empty: the end is cut."""


def _tokens_of(places: Sequence[Span], start: int, stop: int) -> Span:
    """The tokens that hold a character of [start, stop): a tokenizer may join what stands at a border."""
    inside = [index for index, (first, last) in enumerate(places) if first < stop and last > start]
    return (inside[0], inside[-1] + 1) if inside else (len(places), len(places))


def _learnable(content: Text | Completion | Chat) -> tuple[LossOn, ...]:
    """The values of loss_on that mean something for a row; the first is the default."""
    match content:
        case Text():
            return ("all",)
        case Completion():
            return ("completion", "all")
        case Chat(prompt=None):
            return ("assistant", "all")
        case Chat():
            return ("completion", "assistant", "all")
