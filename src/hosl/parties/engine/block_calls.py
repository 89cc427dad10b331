"""Recorded calls of blocks, so that a block can be called again after a forward pass: for all rows or for some."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_NOT_BY_ROW = ("position_bias", "rel_embeddings", "relative_pos")
"""The arguments of blocks whose first dimension is never rows, though it may be as long: heads, or distances."""


@dataclass(slots=True)
class BlockCall:
    """The arguments of one call; the first is the hidden state [rows, seq, width]."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def hidden(self, output: Any) -> torch.Tensor:
        """The hidden state [rows, seq, width] in what a block returned: alone, or before its attention's weights."""
        return output[0] if isinstance(output, tuple) else output

    def of_rows(self, rows: slice, total: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments after the hidden state, cut to `rows` of the `total` rows of the call."""
        by_name = of_rows(self.kwargs, rows, total)
        alibi = by_name.get("alibi")
        if (
            isinstance(alibi, torch.Tensor) and alibi.dim() == 3
        ):  # BLOOM flattens [rows, heads] into one dimension
            by_name["alibi"] = self.kwargs["alibi"].unflatten(0, (total, -1))[rows].flatten(0, 1)
        return of_rows(self.args[1:], rows, total), by_name


@contextmanager
def recorded(blocks: Sequence[nn.Module]) -> Iterator[list[BlockCall]]:
    """Context manager: a list to which every call of one of `blocks` is added, in order. Tensors are not copied."""
    calls: list[BlockCall] = []

    def record(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(BlockCall(args, kwargs))

    hooks = [block.register_forward_pre_hook(record, with_kwargs=True) for block in blocks]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def of_rows(argument: Any, rows: slice, total: int) -> Any:
    """The argument with every tensor of `total` rows cut to `rows`; masks have all rows, rotary angles often one."""
    if isinstance(argument, torch.Tensor):
        return argument[rows] if argument.dim() and len(argument) == total else argument
    if isinstance(argument, dict):
        return {k: v if k in _NOT_BY_ROW else of_rows(v, rows, total) for k, v in argument.items()}
    if isinstance(argument, tuple | list):
        return tuple(of_rows(element, rows, total) for element in argument)
    return argument
