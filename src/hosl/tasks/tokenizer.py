"""A tokenizer read from its folder by the `tokenizers` library alone: a device needs no transformers."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from hosl.errors import HoslError, TaskError
from hosl.system.model_limits import ModelLimits, model_limits
from hosl.system.own_files import own_file
from hosl.tasks.model_settings import model_json, token_text


class TextTokenizer:
    """Text -> token ids, with the model's own special tokens."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        pad_id: int,
        limits: ModelLimits | None = None,
        *,
        cut_left: bool = False,
        folder: Path | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        self.folder = folder
        """The folder that it was read from, where a chat template stands; None: none."""
        self.limits = limits or ModelLimits()
        self._cut_left = cut_left
        self._tail = self._special_tail()

    @classmethod
    def load(
        cls, folder: Path, read: Callable[[Path], tokenizers.Tokenizer] | None = None
    ) -> "TextTokenizer":
        """Read tokenizer.json of a model folder; the padding token from the files beside it.

        Args:
            folder: the folder of a model, or of a client's half.
            read: reads the tokenizer of a folder that `hosl split` did not write, whose other files may override
                tokenizer.json: `hosl.split.transformers_tokenizer`. None: tokenizer.json as it is.

        Raises:
            TaskError: if there is no tokenizer.json, or it is damaged.
            FolderError: if it is a link out of the folder.
        """
        file = own_file(folder, "tokenizer.json")
        if not file.is_file():
            raise TaskError(
                f"{folder} has no tokenizer.json, and a model without a tokenizer cannot read text; save a fast one "
                "there: AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file)) if read is None else read(folder)
        except HoslError:
            raise
        except Exception as cause:  # the library raises plain Exception
            raise TaskError(f"{file} is not a tokenizer: {cause}; fetch it again") from cause
        return cls(
            tokenizer, _pad_id(folder, tokenizer), model_limits(folder), cut_left=_cut_left(folder),
            folder=folder,
        )  # fmt: skip

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids with special tokens; cut to `max_tokens` on the tokenizer's truncation side, special ones kept."""
        return self.cut(tuple(self._tokenizer.encode(text).ids), max_tokens)

    def cut(self, ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The ids of a text, cut as in `encode`."""
        if len(ids) <= max_tokens:
            return ids
        if self._cut_left:
            return (*ids[: self.opening], *ids[len(ids) - max_tokens + self.opening :])
        return (*ids[: max_tokens - len(self._tail)], *self._tail)

    def token(self, token_id: int) -> str | None:
        """The token of an id; None: there is none."""
        return self._tokenizer.id_to_token(token_id)

    def encode_open(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on: opening special tokens, no closing ones."""
        ids = self._tokenizer.encode(text).ids
        return tuple(ids[: len(ids) - len(self._tail)])

    def encode_as_is(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that names its own special tokens, such as a chat template's."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def located(self, text: str, *, as_is: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """Token ids, and the span [start, stop) of the text's characters that each token stands for.

        A token of spaces alone has the last of them; a special token that the tokenizer adds has none of the text.

        Args:
            text: the text.
            as_is: True: as in `encode_as_is`; False: as in `encode_open`.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=not as_is)
        length = len(encoding.ids) - (0 if as_is else len(self._tail))
        places = [(start if start < stop else stop - 1, stop) for start, stop in encoding.offsets]
        return tuple(encoding.ids[:length]), places[:length]

    @cached_property
    def eos_id(self) -> int | None:
        """The token that ends a text; None: the model's files name none."""
        return None if self.folder is None else _eos_id(self.folder, self._tokenizer)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens as they stand in a text, such as the one that ends a turn of a chat."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the special tokens."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(number for number, token in added if token.special)

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def continuation(self, before: Sequence[int]) -> Callable[[int], str]:
        """The function from each token that follows `before`, in turn, to the text that it makes certain.

        A character of several tokens comes whole, with the last of them. Special tokens are left out.

        Raises (the function):
            TaskError: if the tokenizer cannot undo what it does.
        """
        stream = tokenizers.decoders.DecodeStream(ids=list(before), skip_special_tokens=True)

        def decoded(token: int) -> str:
            try:
                return stream.step(self._tokenizer, token) or ""
            except Exception as cause:  # the library raises plain Exception
                raise TaskError(f"the tokenizer cannot turn token {token} into text: {cause}") from cause

        return decoded

    def token_id(self, token: str) -> int | None:
        """The id of a token; None: there is none."""
        return self._tokenizer.token_to_id(token)

    @property
    def opening(self) -> int:
        """The number of special tokens that open every text."""
        return len(self._tokenizer.encode("").ids) - len(self._tail)

    def _special_tail(self) -> tuple[int, ...]:
        """The special tokens that the post-processor puts after a text."""
        probes = ("a", *self._tokenizer.get_vocab())  # a tokenizer may drop a letter that it does not know
        encodings = (self._tokenizer.encode(text) for text in probes)
        encoding = next((e for e in encodings if 0 in e.special_tokens_mask), None)
        if encoding is None:
            return ()
        tail: list[int] = []
        for token, special in zip(
            reversed(encoding.ids), reversed(encoding.special_tokens_mask), strict=True
        ):
            if not special:
                break
            tail.insert(0, token)
        return tuple(tail)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """The settings in a file of a model's folder, where it is there; a tokenizer takes no file of another content."""
    content = model_json(folder, name)
    if not isinstance(content, dict | None):
        raise TaskError(f"{folder / name} holds no settings but {type(content).__name__}; fetch it again")
    return content or {}


def _cut_left(folder: Path) -> bool:
    """Whether the tokenizer cuts a long text at its beginning: `truncation_side` of tokenizer_config.json."""
    return _settings(folder, "tokenizer_config.json").get("truncation_side") == "left"


def _pad_id(folder: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """The id for padding: the named padding token, else the end-of-text token, else 0. Padded positions are masked."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        settings = _settings(folder, name)
        if isinstance(settings.get("pad_token_id"), int) and settings["pad_token_id"] >= 0:  # -1: none
            return settings["pad_token_id"]
        for key in ("pad_token", "eos_token"):
            if (token_id := _id_of(settings.get(key), tokenizer)) is not None:
                return token_id
    return 0


def _eos_id(folder: Path, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of the token that ends a text: the one that the tokenizer names, else the model's first."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (token_id := _id_of(_settings(folder, name).get("eos_token"), tokenizer)) is not None:
            return token_id
    ids = _settings(folder, "config.json").get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if isinstance(first, int) and first >= 0 else None


def _id_of(setting: Any, tokenizer: tokenizers.Tokenizer) -> int | None:
    """The id of a token that settings name; None: they name none, or it is not the tokenizer's."""
    text = token_text(setting)
    return None if text is None else tokenizer.token_to_id(text)
