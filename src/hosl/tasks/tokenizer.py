"""A tokenizer read from its folder by the `tokenizers` library alone: a device needs no transformers."""

import json
from collections.abc import Callable
from pathlib import Path

import tokenizers

from hosl.errors import HoslError, TaskError
from hosl.system.model_limits import ModelLimits, model_limits
from hosl.system.own_files import own_file


class TextTokenizer:
    """Text -> token ids, with the model's own special tokens."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, pad_id: int, limits: ModelLimits | None = None
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.pad_id = pad_id
        self.limits = limits or ModelLimits()
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
        return cls(tokenizer, _pad_id(folder, tokenizer), model_limits(folder))

    def encode(self, text: str, max_tokens: int) -> tuple[int, ...]:
        """Token ids with special tokens; cut at the right to `max_tokens`, the closing special tokens kept."""
        return self.cut(tuple(self._tokenizer.encode(text).ids), max_tokens)

    def cut(self, ids: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
        """The ids of a text, cut as in `encode`."""
        if len(ids) <= max_tokens:
            return ids
        return (*ids[: max_tokens - len(self._tail)], *self._tail)

    def token(self, token_id: int) -> str | None:
        """The token of an id; None: there is none."""
        return self._tokenizer.id_to_token(token_id)

    def encode_open(self, text: str) -> tuple[int, ...]:
        """Token ids of a text that goes on: opening special tokens, no closing ones."""
        ids = self._tokenizer.encode(text).ids
        return tuple(ids[: len(ids) - len(self._tail)])

    @property
    def opening(self) -> int:
        """The number of special tokens that open every text."""
        return len(self._tokenizer.encode("").ids) - len(self._tail)

    def _special_tail(self) -> tuple[int, ...]:
        """The special tokens that the post-processor puts after a text."""
        encoding = self._tokenizer.encode("a")
        tail: list[int] = []
        for token, special in zip(
            reversed(encoding.ids), reversed(encoding.special_tokens_mask), strict=True
        ):
            if not special:
                break
            tail.insert(0, token)
        return tuple(tail)


def _pad_id(folder: Path, tokenizer: tokenizers.Tokenizer) -> int:
    """The id for padding: the named padding token, else the end-of-text token, else 0. Padded positions are masked."""
    for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json"):
        if not own_file(folder, name).is_file():
            continue
        settings = json.loads((folder / name).read_text(encoding="utf-8"))
        if isinstance(settings.get("pad_token_id"), int) and settings["pad_token_id"] >= 0:  # -1: none
            return settings["pad_token_id"]
        for key in ("pad_token", "eos_token"):
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            token_id = tokenizer.token_to_id(token) if isinstance(token, str) else None
            if token_id is not None:
                return token_id
    return 0
