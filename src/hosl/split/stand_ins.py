"""Modules without parameters that replace those of the other half, so that HF's own forward runs unchanged."""

from typing import Any

import torch
from torch import nn

from hosl.split.families import StandIn


class PassThrough(nn.Module):
    """A block of the other half: returns its input. It keeps the indices of later blocks, and so their names."""

    def __init__(self, block: nn.Module, *, returns_tuple: bool) -> None:
        """Stand for `block`; its plain attributes stay, since some models choose a block's mask by one."""
        super().__init__()
        facts = {k: v for k, v in vars(block).items() if isinstance(v, str | int | float) and k[0] != "_"}
        self.__dict__.update(facts)
        self.eval()
        self._returns_tuple = returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The hidden state, unchanged; alone, or before what would be the attention's weights."""
        return (hidden_states, None) if self._returns_tuple else hidden_states


class ZeroPositions(nn.Module):
    """Position embeddings of the other half: adding zero leaves the hidden state as it came (-0.0 becomes 0.0)."""

    def forward(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A zero without dimensions: it takes the dtype of the hidden state that it is added to."""
        return torch.zeros((), device=first.device)


class GivenEmbeddings(nn.Module):
    """An encoder's embedding layer of the other half: the hidden state that arrives is the embedding."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *args: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The hidden state, by whichever argument the family passes it."""
        hidden = inputs_embeds if inputs_embeds is not None else args[0]
        assert hidden is not None, "a server half is called with inputs_embeds"
        return hidden


def stand_in(kind: StandIn) -> nn.Module | float | None:
    """A new stand-in of a kind; None for the kind `none`, a number for a number: what the other side has done."""
    match kind:
        case "none":
            return None
        case "identity":
            return nn.Identity()
        case "zeros":
            return ZeroPositions()
        case "inputs_embeds":
            return GivenEmbeddings()
        case "one":
            return 1.0
        case "zero":
            return 0.0
