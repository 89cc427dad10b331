"""The padding token of a decoder that classifies: transformers reads the class off the last token that is another."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from hosl.system.own_files import own_file


def last_token_padding(folder: Path, config: Any) -> tuple[int, list[str]]:
    """The pad_token_id by which plain transformers reads the class off the right token, and lines about it.

    It is the tokenizer's padding token, with which people pad; else that of the config, else the end-of-sequence token.
    hosl itself goes by the mask.

    Args:
        folder: the model's.
        config: its config.
    """
    tokenizer = _tokenizer(folder)
    own = _named(folder, tokenizer)
    stated = (
        config.pad_token_id if isinstance(config.pad_token_id, int) and config.pad_token_id >= 0 else None
    )
    end = config.eos_token_id
    end = end[0] if isinstance(end, list) and end else end
    padding = next((found for found in (own, stated, end) if isinstance(found, int)), 0)
    notes = []
    if padding != stated:
        why = (
            "that of the tokenizer"
            if own is not None
            else "the tokenizer has none either: the end-of-sequence token"
        )
        was = "has no pad_token_id" if stated is None else f"has pad_token_id {stated}"
        notes.append(
            f"config.json {was}, by which transformers finds a row's last token: {padding} stands for it ({why})"
        )
    if tokenizer is not None and tokenizer.encode("a").ids[-1:] == [padding]:
        notes.append(
            f"texts of this tokenizer end with its padding token {padding}: plain transformers reads the class off the "
            "token before, hosl off the last; give the tokenizer a pad_token of its own"
        )
    return padding, notes


def _tokenizer(folder: Path) -> tokenizers.Tokenizer | None:
    """The tokenizer as its file is; None: there is none that can be read, which is said where texts are."""
    try:
        file = own_file(folder, "tokenizer.json")
        return tokenizers.Tokenizer.from_file(str(file)) if file.is_file() else None
    except Exception:  # the library raises plain Exception
        return None


def _named(folder: Path, tokenizer: tokenizers.Tokenizer | None) -> int | None:
    """The id of the padding token that the tokenizer's own settings name; None: they name none."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            settings = json.loads(own_file(folder, name).read_text(encoding="utf-8"))
            token = settings.get("pad_token")
        except (OSError, ValueError, AttributeError):
            continue
        token = token.get("content") if isinstance(token, dict) else token
        if tokenizer is not None and isinstance(token, str):
            return tokenizer.token_to_id(token)
    return None
