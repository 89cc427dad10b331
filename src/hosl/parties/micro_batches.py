"""The division of a batch into rows that are evaluated at once. No torch: clients of every runtime divide alike."""

from collections.abc import Sequence

TOKENS_AT_ONCE = 4096
"""The most tokens that a client evaluates at once by default; `micro_batch_size` takes precedence."""


def row_slices(shape: Sequence[int], evaluations: int, micro_batch_size: int | None = None) -> list[slice]:
    """The micro-batches of a batch [rows, seq] whose rows are evaluated `evaluations` times at once.

    By default the evaluations of a micro-batch have no more rows than the batch, so that a step needs no more memory
    than the forward pass of its batch, and no more than `TOKENS_AT_ONCE` tokens.
    """
    rows, seq = shape
    by_memory = min(-(-rows // evaluations), TOKENS_AT_ONCE // (seq * evaluations))
    at_once = max(micro_batch_size or by_memory, 1)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]
