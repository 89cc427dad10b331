"""Rows of tokens -> rectangular batches, padded to the longest row of the batch and no further."""

from collections.abc import Sequence
from typing import Literal

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
    places = [
        np.arange(len(row) - length, len(row)) for row, length in zip(rows, option_lengths, strict=True)
    ]
    return _left_padded(rows, places, pad_id, "rows")


def token_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """A batch of left-padded rows, their `scored` tokens as targets; the loss is the mean over all of these."""
    places = [np.concatenate([np.arange(*span) for span in example.scored]) for example in examples]
    return _left_padded([example.rows[0] for example in examples], places, pad_id, "tokens")


def _left_padded(
    rows: Sequence[tuple[int, ...]],
    places: Sequence[np.ndarray],
    pad_id: int,
    mean_over: Literal["rows", "tokens"],
) -> Batch:
    """A batch of rows, and of each the tokens at some places as targets."""
    width, span = max(len(row) for row in rows), max(len(of_row) for of_row in places)
    input_ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int8)
    positions = np.zeros((len(rows), span), dtype=np.int32)
    tokens = np.full((len(rows), span), -1, dtype=np.int32)
    for index, (row, of_row) in enumerate(zip(rows, places, strict=True)):
        first = width - len(row)
        input_ids[index, first:] = row
        mask[index, first:] = 1
        # the logits that predict a token stand one position before it
        positions[index, : len(of_row)] = first + of_row - 1
        tokens[index, : len(of_row)] = input_ids[index, first + of_row]
    return Batch(input_ids, OptionTargets(mask, positions, tokens, mean_over))
