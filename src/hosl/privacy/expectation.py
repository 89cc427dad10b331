"""What a whole public language model expects after a text: candidates for the search, as text is seldom a surprise."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from hosl.errors import ConfigError
from hosl.split import load_model

Expectation = Callable[[Sequence[torch.Tensor]], torch.Tensor]
"""Texts of tokens (int64, [tokens] each, perhaps none) -> the score of every token after each, [texts, vocabulary]."""


def expectation(name: str, vocabulary: int, seed: int) -> Expectation:
    """The expectation of a public model, on the CPU in float32.

    Args:
        name: the model, as in `hosl split`.
        vocabulary: the number of tokens of the half under attack.
        seed: of weights that a checkpoint does not hold; a language model has none.

    Raises:
        ModelError, SplitError: if it cannot be loaded.
        ConfigError: if it has no head of its own, or another vocabulary.
    """
    loaded = load_model(name, head="causal", num_labels=None, seed=seed)
    if loaded.initialised:
        raise ConfigError(
            f"--public-model {name} has no weights of {loaded.initialised[0]}, so it expects nothing; name the "
            "language model that the half was split from"
        )
    found = loaded.model.get_input_embeddings().num_embeddings
    if found != vocabulary:
        raise ConfigError(
            f"--public-model {name} has {found:,} tokens, the half {vocabulary:,}; name the model that the half was "
            "split from"
        )
    return partial(_expected, loaded.model)


@torch.no_grad()
def _expected(model: Any, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The last logits of each text, float32: one text at a time, as only the last position needs the large head."""
    begin, size = model.config.bos_token_id, model.get_input_embeddings().num_embeddings
    rows = []
    for text in texts:
        ids = text if len(text) or begin is None or begin >= size else text.new_tensor([begin])
        if not len(ids):  # nothing is expected of a first token where none says that a text begins
            rows.append(torch.zeros(size))
            continue
        states = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state
        rows.append(model.get_output_embeddings()(states[0, -1]).float())
    return torch.stack(rows)
