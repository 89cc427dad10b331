"""A client that only computes activations: the baseline that every comparison owes, and the base of the others.

Requires of the half: dropout off (L+ and L- must be one function, paper.md I4), caches off; `hosl.split` gives it so.
"""

from collections.abc import Iterable, Sequence

import torch

from hosl.core.targets import Batch
from hosl.split import ClientHalf

TOKENS_AT_ONCE = 4096
"""How many tokens a client evaluates at once where `micro_batch_size` does not say otherwise."""


class FrozenClient:
    """A client that only computes activations: the baseline that every comparison owes, and the base of the others."""

    def __init__(self, half: ClientHalf, *, micro_batch_size: int | None = None, device: str = "cpu") -> None:
        """Take over `half`.

        Args:
            half: the client's.
            micro_batch_size: how many rows of a batch are evaluated at once; None: as many as memory suggests
                (`row_slices`). Rows do not see each other, so this changes rounding and memory only.
            device: a torch device.
        """
        self.half = half
        self.micro_batch_size = micro_batch_size
        self.device = torch.device(device)
        half.to(self.device)
        half.eval()

    def forward(self, batch: Batch) -> torch.Tensor:
        """h = f_c(x; theta_c) [rows, seq, width], without a graph."""
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._evaluate(ids[rows], mask[rows])) for rows in self._slices(ids)), len(ids))

    def _evaluate(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.half(ids, mask)

    def _slices(self, ids: torch.Tensor, *, evaluations: int = 1) -> list[slice]:
        return row_slices(ids.shape, evaluations, self.micro_batch_size)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        return ids, torch.from_numpy(batch.targets.mask).to(self.device, torch.int64)


def row_slices(shape: Sequence[int], evaluations: int, micro_batch_size: int | None = None) -> list[slice]:
    """The micro-batches of a batch [rows, seq] of which each row is evaluated so many times at once.

    By default they take no more rows in all than the batch has, so that no step needs more memory than the forward
    pass of its batch, and no more than `TOKENS_AT_ONCE` tokens.
    """
    rows, seq = shape
    by_memory = min(-(-rows // evaluations), TOKENS_AT_ONCE // (seq * evaluations))
    at_once = max(micro_batch_size or by_memory, 1)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def in_one(parts: Iterable[tuple[slice, torch.Tensor]], rows: int) -> torch.Tensor:
    """[..., rows, seq, width] from its micro-batches, the rows third from last; a single one is handed through."""
    whole = None
    for of_rows, part in parts:
        if part.shape[-3] == rows:
            return part
        if whole is None:
            whole = part.new_empty(*part.shape[:-3], rows, *part.shape[-2:])
        whole[..., of_rows, :, :] = part
    assert whole is not None, "a batch has rows"
    return whole
