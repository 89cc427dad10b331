"""Texts as rows of token ids, cut to what was asked; what the cut costs, and whether the model can read every row."""

import sys
from collections.abc import Mapping, Sequence
from typing import Literal

from hosl.errors import TaskError
from hosl.tasks.base import Example
from hosl.tasks.tokenizer import TextTokenizer


class Encoder:
    """The rows of a task under its `max_tokens`, and the count of what they lose by it."""

    def __init__(self, tokenizer: TextTokenizer, max_tokens: int | Literal["auto"]) -> None:
        """Count nothing yet; auto: as many tokens as the model has positions."""
        self._tokenizer, self._asked = tokenizer, max_tokens
        positions = tokenizer.limits.positions or sys.maxsize
        self.max_tokens = positions if max_tokens == "auto" else max_tokens
        self._rows = self._cut_rows = self._tokens = self._cut_tokens = self._longest = 0
        self._whole: set[tuple[int, ...]] = set()
        self._kept: set[tuple[int, ...]] = set()

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids with special tokens, the end cut off."""
        whole = self._tokenizer.encode(text, sys.maxsize)
        return self.counted(whole, self._tokenizer.cut(whole, self.max_tokens))

    def counted(self, whole: tuple[int, ...], kept: tuple[int, ...]) -> tuple[int, ...]:
        """`kept`, after the cut from `whole` is counted."""
        self._rows, self._tokens = self._rows + 1, self._tokens + len(whole)
        self._longest = max(self._longest, len(whole))
        if len(kept) < len(whole):
            self._cut_rows, self._cut_tokens = self._cut_rows + 1, self._cut_tokens + len(whole) - len(kept)
            self._whole.add(whole)
            self._kept.add(kept)
        return kept

    def notes(self) -> list[str]:
        """The line about the cut; none if nothing was cut."""
        if not self._cut_rows:
            return []
        text = (
            f"max_tokens: {self._asked} cuts {self._cut_rows:,} of {self._rows:,} rows, "
            f"{self._cut_tokens / self._tokens:.1%} of all tokens; the longest has {self._longest:,}"
        )
        alike = len(self._whole) - len(self._kept)
        if alike:
            text += f"; {alike:,} can no longer be told from another"
        return [text]

    def check(self, parts: Mapping[str, Sequence[Example]]) -> None:
        """Refuse rows that the model cannot read: without a token, longer than its positions, ids beyond its table.

        Raises:
            TaskError: if there is such a row, or the padding token is beyond the table.
        """
        limits = self._tokenizer.limits
        positions, vocabulary = limits.positions or sys.maxsize, limits.vocabulary or sys.maxsize
        for part, examples in parts.items():
            for row in (row for example in examples for row in example.rows):
                if not row:
                    raise TaskError(
                        f"a text of {part} has no token for this model's tokenizer: it is made of characters that the "
                        "tokenizer drops; drop the row"
                    )
                if len(row) > positions:
                    raise TaskError(
                        f"a row of {part} has {len(row):,} tokens, the model has {positions:,} positions; set "
                        "task.max_tokens to auto, or to less"
                    )
                if max(row) >= vocabulary:
                    raise TaskError(
                        f"{part} has the token id {max(row)} ({self._tokenizer.token(max(row))!r}), the model's table "
                        f"has {vocabulary} rows: this tokenizer belongs to another model, or the table was not resized"
                    )
        if not 0 <= self._tokenizer.pad_id < vocabulary:
            raise TaskError(
                f"the padding token has the id {self._tokenizer.pad_id}, the model's table has {vocabulary} rows; name "
                "another pad_token in tokenizer_config.json, such as the eos_token"
            )
