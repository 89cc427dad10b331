"""The base of clients that train the output projections of their last blocks by forward passes.

An output projection is a layer whose output is added to the residual stream: y = W x + b. In a pre-LN block the stream
goes on beside the layers, so the gradient returned at the cut stands for the gradient at y, and g^T x for that of W.
How far that is true, and what each subclass makes of it: methods.md (i), (o), docs/concepts/residual-feedback.md.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hosl.core.targets import Batch
from hosl.parties.clients.frozen import FrozenClient, in_one
from hosl.parties.engine.block_calls import BlockCall, recorded
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf
from hosl.split.adapters import lora_layers


@dataclass(slots=True)
class Part:
    """A micro-batch of the last forward pass."""

    rows: slice
    calls: list[BlockCall]
    """The calls of the trained blocks for these rows."""
    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    """The kept inputs of modules, by their names in the half."""
    stream_alone: bool = False
    """Whether a block's hidden state is computed again from the block below it."""
    gradient: torch.Tensor | None = None
    """dL/dh of these rows at the output of the block that is updated next; only while weights are updated."""

    def within(self, rows: slice) -> slice:
        """The slice of these rows that has the given rows of the batch."""
        return slice(rows.start - self.rows.start, rows.stop - self.rows.start)


class OutputProjectionClient(FrozenClient):
    """A client whose trained weights are those of the output projections of its last blocks.

    Requires: rows and blocks as `RecomputingClient` does.
    """

    def __init__(
        self,
        half: ClientHalf,
        *,
        blocks: int = 1,
        decay: float = 1.0,
        micro_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        """Train the output projections of the last `blocks` blocks; `requires_grad` of all weights is set anew.

        Args:
            half: the client half, with float weights, or with adapters on these layers, which are then trained alone.
            blocks: at least 1, at most the half's cut.
            decay: the factor of the step for each block further down.
            micro_batch_size: the rows that are evaluated at once; None: chosen by memory (`row_slices`).
            device: a torch device.
        """
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        all_blocks: Any = half.model.get_submodule(half.blocks_name)
        assert 1 <= blocks <= len(all_blocks), f"{blocks} trained blocks of {len(all_blocks)}"
        first = len(all_blocks) - blocks
        self._decay = decay
        adapted = bool(lora_layers(half))  # then adapters alone are trained, on the layers that have some
        self._blocks: list[nn.Module] = list(all_blocks)[first:]
        self._block_names = [f"{half.blocks_name}.{first + i}" for i in range(blocks)]
        self._of_block: list[dict[str, nn.Module]] = [
            {
                f"{name}.{projection}": layer
                for projection in half.output_projections
                if hasattr(layer := block.get_submodule(projection), "lora_A") or not adapted
            }
            for name, block in zip(self._block_names, self._blocks, strict=True)
        ]
        """The trained layers of each of these blocks, by their names in the half."""
        self._projections = {name: layer for layers in self._of_block for name, layer in layers.items()}
        """All of them, in block order."""
        half.model.requires_grad_(False)
        for projection in self._projections.values():
            adapters = [p for name, p in projection.named_parameters() if "lora_" in name]
            for p in adapters or projection.parameters():
                p.requires_grad_(True)
        self.trained = trained_parameters(half.model)
        self._parts: list[Part] = []
        """The micro-batches of the last `forward_keeping_inputs`."""

    def forward_keeping_inputs(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; what the gradient will be combined with stays here until the update."""
        self._parts = []  # of a forward pass whose gradient never came
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._part(rows, ids, mask)) for rows in self._slices(ids)), len(ids))

    def _decayed(self, block: int) -> float:
        """The factor of the step of a trained block: decay, as often as there are trained blocks above it."""
        return self._decay ** (len(self._blocks) - 1 - block)

    def _part(self, rows: slice, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """h of these rows; records the calls of the trained blocks, of which only the first keeps its hidden state."""
        with torch.no_grad(), recorded(self._blocks) as calls:
            h = self.half(ids[rows], mask[rows])
        forget_hidden_(calls[1:])
        self._parts.append(Part(rows, calls))
        return h


def forget_hidden_(calls: list[BlockCall]) -> None:
    """Release the hidden states that these calls were given."""
    for call in calls:
        call.args = (None, *call.args[1:])
