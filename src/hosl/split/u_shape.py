"""The U-shaped split: norm and head go to the client too, so that labels never leave it.

    client: embeddings, blocks 0..cut-1 --h--> server: blocks cut..n-1 --states--> client: final norm, head, loss

The head half is the server half at cut = n; the trunk is a server half without what follows the blocks. A tied head
shares the embedding that the client holds already: the same parameter, not a copy.
"""

from copy import deepcopy
from typing import Any

import torch

from hosl.errors import SplitError
from hosl.split.caches import HalfCache
from hosl.split.families import Family
from hosl.split.halves import (
    ClientHalf,
    Half,
    ServerHalf,
    at_last_token,
    check_cut,
    cut_to_client_,
    cut_to_server_,
    separate_ties_,
)
from hosl.split.structure import family_for


class TrunkHalf(Half):
    """Blocks cut..n-1 and nothing after them. `trunk(hidden, attention_mask, positions)` is the last block's states."""

    def __call__(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor,
        positions: torch.Tensor,
        cache: HalfCache | None = None,
    ) -> torch.Tensor:
        """The states at the scored positions.

        Args:
            hidden: [rows, seq, width], what the client half returned.
            attention_mask: [rows, seq], int64.
            positions: [positions], int64, of every row; for a classification head [0], which stands for the token that
                it reads: the first, or with a decoder each row's last by the mask. Or [rows, seq], bool, of each row
                its own.
            cache: the tokens before these, for one row of a causal model; is made longer in place.

        Returns:
            [rows, positions, width]; of each row its own: [1, scored, width], row by row.
        """
        base = getattr(self.model, self.model.base_model_prefix)
        options = self._keeping(cache)
        states = base(inputs_embeds=hidden, attention_mask=attention_mask, **options).last_hidden_state
        if cache is not None:
            cache.advance_(hidden.shape[1])
        if self._family.pools_last_token:
            return at_last_token(states, attention_mask)[:, None]
        return states[positions][None] if positions.dtype == torch.bool else states[:, positions]


class HeadHalf(ServerHalf):
    """Final norm and head, or pooler and classifier; held by the client. `head(states)` is the logits."""

    def __call__(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: HalfCache | None = None,
    ) -> torch.Tensor:
        """The logits of a trunk's states.

        Args:
            hidden: the states [rows, positions, width].
            attention_mask: [rows, positions], int64. No block is left that reads it, so None will do.
            positions: [positions], int64; the states to take, for a causal model. None: all.
            cache: as of `ServerHalf`; no block is left that would read it.

        Returns:
            Logits: [rows, classes], or [rows, positions, vocabulary].
        """
        if attention_mask is None:
            attention_mask = torch.ones(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        return super().__call__(hidden, attention_mask, positions, cache)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """The logits [rows, classes] or [rows, positions, vocabulary] of the states [rows, positions, width]."""
        return self(states)


def split_u_shape(model: Any, cut: int) -> tuple[ClientHalf, TrunkHalf, HeadHalf]:
    """Cut a Hugging Face model in three, for a client that keeps the labels. No weight is copied.

    The logits are bit for bit those of the whole model at the scored positions, except with OPT's `project_out`: the
    whole model multiplies every position by it, the head only the scored ones, and a matrix product of fewer rows may
    round differently; so does a decoder's `score`. Dropout is off in all three (`eval`).

    Args:
        model: as for `split_model`.
        cut: 0..n.

    Raises:
        SplitError: if the family is unknown, or the cut is outside 0..n.
    """
    family = family_for(model)
    check_cut(family, model, cut)
    pieces = [deepcopy(model, {id(p): p for p in model.parameters()}) for _ in range(3)]
    cut_to_client_(pieces[0], family, cut)
    cut_to_trunk_(pieces[1], family, cut)
    cut_to_head_(pieces[2], family)
    separate_ties_(pieces[0], pieces[1])  # of shared modules: each piece has its own
    return (
        ClientHalf(pieces[0], family, cut),
        TrunkHalf(pieces[1], family, cut),
        HeadHalf(pieces[2], family, cut),
    )


def joined_server_half(trunk: TrunkHalf, head: HeadHalf) -> ServerHalf:
    """The ordinary server half of a trunk and a head, as merging and export want it; it shares their tensors."""
    model = deepcopy(head.model, {id(p): p for p in head.model.parameters()})
    model.set_submodule(trunk.blocks_name, trunk.model.get_submodule(trunk.blocks_name))
    half = ServerHalf(model, head._family, trunk.cut)
    half.config = head.config  # as it is written: that of `model` is of the calls
    return half


def cut_to_trunk_(model: Any, family: Family, cut: int) -> None:
    """Take away, in place, what the client owns before and after the trunk."""
    blocks = model.get_submodule(family.blocks)
    cut_to_client_(model, family, len(blocks))
    cut_to_server_(model, family, cut)


def cut_to_head_(model: Any, family: Family) -> None:
    """Take away, in place, everything before the final norm.

    Raises:
        SplitError: if the head reads every token, of which the trunk sends only the scored ones.
    """
    if getattr(model.config, "classifier_pooling", "cls") == "mean":
        raise SplitError(
            f"labels at the client: the head of this {family.model_type} averages over all tokens "
            "(classifier_pooling: mean), and the server sends back one of each row; leave the labels with the server"
        )
    cut_to_server_(model, family, len(model.get_submodule(family.blocks)))
