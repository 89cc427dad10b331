"""A model folder's tokenizer as transformers loads it: class, tokenizer_config.json and special tokens applied.

Written as tokenizer.json, it gives a device the same ids by the `tokenizers` library alone.
"""

from pathlib import Path
from typing import Any

import tokenizers
import transformers

from hosl.errors import ModelError
from hosl.split.reading.config_json import read_config
from hosl.system.readable import one_line

_PROBES = (
    "", "A", " two  spaces ", "Über-naïve CAFÉ, don't!", "12,345.67 €", "tab\tand\nline", "日本語の文",
    "\u200b\ufb01ne \u0627 b",
    "\U0001f469\u200d\U0001f4bb", "_under_score_ e-mail@host.org", "x" * 120,
)  # fmt: skip


def transformers_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer that AutoTokenizer loads from `folder`; no code of the folder is run.

    Raises:
        ConfigError, SplitError, ModelError: if config.json cannot be read, as in `read_config`.
        ModelError: if it cannot be loaded, or does more than the `tokenizers` library can.
    """
    if (folder / "config.json").is_file():  # transformers reads it too, and would blame the tokenizer
        read_config(folder, str(folder))
    try:
        loaded: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as cause:  # each library raises its own
        raise ModelError(
            f"{folder}: transformers cannot load the tokenizer: {one_line(cause)}; fetch its files again"
        ) from cause
    plain = _plain(loaded)
    if plain is None:
        raise ModelError(
            f"{folder}: its tokenizer, {type(loaded).__name__}, does not give the same ids by the tokenizers library "
            "alone, which is all that a device has; choose a model with a fast tokenizer and without "
            "split_special_tokens"
        )
    return plain


def _plain(loaded: Any) -> tokenizers.Tokenizer | None:
    """What the `tokenizers` library keeps of a tokenizer; None if that gives other ids."""
    try:
        plain = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
        plain.no_padding()
        plain.no_truncation()
        texts = [*_PROBES, *map(str, loaded.all_special_tokens)]
        return plain if all(plain.encode(text).ids == loaded(text)["input_ids"] for text in texts) else None
    except Exception:  # a tokenizer that runs in Python has no such form, or cannot be written down
        return None
