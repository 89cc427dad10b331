"""A client that only computes activations: the baseline of every comparison, and the base class of the others.

Requires: a half with dropout off (L+ and L- must be one function, paper.md I4) and caches off, as from `hosl.split`.
"""

from collections.abc import Iterable

import torch

from hosl.core.targets import Batch
from hosl.parties.micro_batches import row_slices
from hosl.split import ClientHalf


class FrozenClient:
    """A client that only computes activations: the baseline of every comparison, and the base class of the others."""

    def __init__(self, half: ClientHalf, *, micro_batch_size: int | None = None, device: str = "cpu") -> None:
        """Move `half` to the device, in eval mode.

        Args:
            half: the client half.
            micro_batch_size: the rows of a batch that are evaluated at once; None: chosen by memory (`row_slices`).
                Rows are independent of each other, so this changes rounding and memory only.
            device: a torch device.
        """
        self.half = half
        self.trained: dict[str, torch.nn.Parameter] = {}
        """The trained parameters by Hugging Face's names; here none."""
        self.micro_batch_size = micro_batch_size
        self.device = torch.device(device)
        half.to(self.device)
        half.eval()

    def forward(self, batch: Batch) -> torch.Tensor:
        """h = f_c(x; theta_c) [rows, seq, width], without a graph."""
        ids, mask = self._inputs(batch)
        with torch.no_grad():
            return in_one(((rows, self.half(ids[rows], mask[rows])) for rows in self._slices(ids)), len(ids))

    def _slices(self, ids: torch.Tensor, *, evaluations: int = 1) -> list[slice]:
        return row_slices(ids.shape, evaluations, self.micro_batch_size)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        return ids, torch.from_numpy(batch.targets.mask).to(self.device, torch.int64)


def in_one(parts: Iterable[tuple[slice, torch.Tensor]], rows: int) -> torch.Tensor:
    """The batch [..., rows, seq, width] from its micro-batches; a single one is returned as it is."""
    whole = None
    for part_rows, part in parts:
        if part.shape[-3] == rows:
            return part
        if whole is None:
            whole = part.new_empty(*part.shape[:-3], rows, *part.shape[-2:])
        whole[..., part_rows, :, :] = part
    assert whole is not None, "a batch has rows"
    return whole
