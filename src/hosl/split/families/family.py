"""What hosl knows of an architecture: the names on either side of a cut.

Names are dotted paths from Hugging Face's top-level model (`OPTForCausalLM`, `BertForSequenceClassification`, ...).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Head = Literal["causal", "classification"]
QueryPlace = Literal["all", "first", "by head"]
"""The place of the queries in a layer's output. `first`: before keys and values. `by head`: first within each head, or
within each group of heads that share keys and values."""
StandIn = Literal["none", "identity", "zeros", "inputs_embeds", "one", "zero"]
"""The kind of module or number that replaces one of the other side (`hosl.split.stand_ins`)."""


@dataclass(frozen=True, slots=True)
class Family:
    """The names of an architecture's modules on either side of a cut."""

    model_type: str
    """The value of `config.model_type`."""
    head: Head
    blocks: str
    """The name of the list of transformer blocks."""
    client_only: Mapping[str, StandIn]
    """The modules before the blocks, also multipliers and rates of dropout, and what each is in the server half."""
    server_only: Mapping[str, StandIn]
    """The modules after the blocks, and what each is in the client half; a classifier's last one is its output."""
    output_projections: tuple[str, ...] = ()
    """The layers of a block whose outputs are added to the residual stream: attention's and the feed-forward's last.
    Without the latter where experts compute it. Empty: not known, so that no method can train by them."""
    norms_above: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The norms between an output projection and the block's output, from the projection up; none in a pre-LN block."""
    norms_on_stream: tuple[str, ...] = ()
    """The norms of a block that the residual stream itself passes, from the block's input up; none if pre-LN."""
    norms_where: tuple[str, bool] | None = None
    """The flag of configs with whose value the norms stand as these two say; else there are none. None: always."""
    output_scale: str = ""
    """The attribute of a block by which outputs are multiplied before they are added to the residual stream."""
    query: str | None = None
    """The layer of a block that computes the tokens' queries and nothing else; None: none is known."""
    query_place: QueryPlace = "all"
    positions_from_mask: bool = False
    """Whether the forward pass counts padding as positions, which are absolute: it is told them by the mask instead."""
    blocks_return_tuples: bool = False
    """Whether a block returns the hidden state as the first of two."""
    needs_a_block: bool = False
    """Whether the forward pass fails without any block: at cut 0 the client has one that passes through."""
    pools_last_token: bool = False
    """Whether the class is read off each row's last token, found by the mask: a decoder as a classifier."""
    shared: tuple[str, ...] = ()
    """The modules outside the blocks that every block reads: each half has them, and neither trains them."""
    alone: tuple[str, ...] = ()
    """The modules of a block whose layers also read what has no rows, such as a table of distances: probes call them
    for one evaluation at a time."""
    guessed: bool = False
    """Whether this is no row: `hosl.split.structure` found it out."""
    cannot: dict[str, str] = field(default_factory=dict)
    """The modules that some configs add, with which the model cannot be cut, and why."""

    @property
    def is_decoder(self) -> bool:
        """Whether tokens see only those before them, so that the forward pass knows a key-value cache."""
        return self.head == "causal" or self.pools_last_token

    def as_classifier(self) -> "Family":
        """The row of a decoder's ...ForSequenceClassification: a `score` in place of the language model's head."""
        after: dict[str, StandIn] = {n: kind for n, kind in self.server_only.items() if n != "lm_head"}
        return replace(
            self, head="classification", server_only=after | {"score": "identity"}, pools_last_token=True
        )

    def has_norms(self, setting: Callable[[str], Any]) -> bool:
        """Whether the norms stand as this row says, by a config's settings by name."""
        return self.norms_where is None or bool(setting(self.norms_where[0])) == self.norms_where[1]
