"""Rows of tokens -> rectangular batches, padded to the longest row of the batch and no further."""

from collections.abc import Sequence

import numpy as np

from hosl.core.targets import Batch, ClassTargets, OptionTargets
from hosl.tasks.base import Example


def class_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """Right-padded rows with a label each."""
    rows = [example.rows[0] for example in examples]
    width = max(len(row) for row in rows)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int8)
    for place, row in enumerate(rows):
        input_ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    labels = np.array([example.label for example in examples], dtype=np.int64)
    return Batch(input_ids, ClassTargets(mask, labels))


def option_batch(rows: Sequence[tuple[int, ...]], option_lengths: Sequence[int], pad_id: int) -> Batch:
    """Left-padded rows, each with its last `option_length` tokens as targets."""
    width, span = max(len(row) for row in rows), max(option_lengths)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int8)
    positions = np.zeros((len(rows), span), dtype=np.int32)
    tokens = np.full((len(rows), span), -1, dtype=np.int32)
    for place, (row, length) in enumerate(zip(rows, option_lengths, strict=True)):
        input_ids[place, width - len(row) :] = row
        mask[place, width - len(row) :] = 1
        # the logits that predict a token stand one position before it
        positions[place, :length] = np.arange(width - length - 1, width - 1)
        tokens[place, :length] = row[-length:]
    return Batch(input_ids, OptionTargets(mask, positions, tokens))
