"""Rows of tokens -> rectangular batches, padded to the longest row of the batch and no further."""

from collections.abc import Sequence

import numpy as np

from hosl.core.targets import Batch, ClassTargets, OptionTargets
from hosl.tasks.base import Example


def class_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """A batch of right-padded rows, each with a class as target."""
    rows = [example.rows[0] for example in examples]
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int8)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    labels = np.array([example.label for example in examples], dtype=np.int64)
    return Batch(input_ids, ClassTargets(mask, labels))


def option_batch(rows: Sequence[tuple[int, ...]], option_lengths: Sequence[int], pad_id: int) -> Batch:
    """A batch of left-padded rows, each with its last `option_length` tokens as targets."""
    width, span = max(len(row) for row in rows), max(option_lengths)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int8)
    positions = np.zeros((len(rows), span), dtype=np.int32)
    tokens = np.full((len(rows), span), -1, dtype=np.int32)
    for index, (row, length) in enumerate(zip(rows, option_lengths, strict=True)):
        input_ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
        # the logits that predict a token stand one position before it
        positions[index, :length] = np.arange(width - length - 1, width - 1)
        tokens[index, :length] = row[-length:]
    return Batch(input_ids, OptionTargets(mask, positions, tokens))
