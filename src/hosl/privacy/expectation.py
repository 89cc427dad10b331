"""What a whole public language model expects after a text: candidates for the search, as text is seldom a surprise."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hosl.errors import ConfigError
from hosl.split import load_model

Expectation = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Texts of tokens (int64, [tokens] each, perhaps none) -> the score of every token after each, [texts, vocabulary]."""


def expectation(name: str, vocabulary: int) -> Expectation:
    """The expectation of a public model, on the CPU in float32.

    Args:
        name: the model, as in `hosl split`.
        vocabulary: the number of tokens of the half under attack.

    Raises:
        ModelError, SplitError: if it cannot be loaded.
        ConfigError: if it has another vocabulary.
    """
    loaded = load_model(name, head="causal", num_labels=None, seed=0)  # nothing is drawn: a head is not new
    found = loaded.model.get_input_embeddings().num_embeddings
    if found != vocabulary:
        raise ConfigError(
            f"--public-model {name} has {found:,} tokens, the half {vocabulary:,}; name the model that the half was "
            "split from"
        )
    return partial(_expected, loaded.model)


@torch.no_grad()
def _expected(model: Any, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The last logits of each text, float32; of an empty text all are 0. One text at a time: nothing is padded."""
    size = model.get_input_embeddings().num_embeddings
    rows = torch.zeros(len(texts), size)
    for row, text in zip(rows, texts, strict=True):
        if len(text):  # of a first token nothing is expected
            logits = model(input_ids=text[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
            row[: len(logits)] = logits[:size]
            row[len(logits) :] = -torch.inf  # embeddings that the head has no score for
    return rows
