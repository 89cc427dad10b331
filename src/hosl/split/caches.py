"""The keys and values that a half keeps while a text goes on, in the cache of transformers."""

from collections.abc import Container
from typing import Any

import torch
from transformers import DynamicCache


class HalfCache:
    """The cache of one text in one half; every call of the half makes it longer. Requires: one row, without padding.

    transformers asks the cache's first layers how many tokens there are, whichever half these belong to: the layers of
    the other half count the tokens too, a byte for each, and hold no key or value.
    """

    def __init__(self, config: Any, own: Container[int]) -> None:
        """Make an empty cache.

        Args:
            config: the Hugging Face config of the whole model.
            own: the indices of the half's blocks.
        """
        self.states = DynamicCache(config=config)
        self.tokens = 0
        """The number of tokens that the half has seen."""
        self._elsewhere = [index for index in range(len(self.states.layers)) if index not in own]

    def advance_(self, tokens: int) -> None:
        """Count the tokens that the half's own blocks have just added to their layers."""
        nothing = torch.zeros(1, 1, tokens, 1, dtype=torch.bool)
        for index in self._elsewhere:
            self.states.update(nothing, nothing, index)
        self.tokens += tokens

    @property
    def size_bytes(self) -> int:
        """The bytes that its tensors hold."""
        layers: list[Any] = self.states.layers
        held = [t for layer in layers for t in (layer.keys, layer.values) if t is not None]
        # a window is a view of what came before it
        return sum(t.untyped_storage().nbytes() for t in held)
