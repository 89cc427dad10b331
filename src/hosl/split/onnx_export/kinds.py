"""The kinds of blocks of a half: those that compute the same function of their input and their weights."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

import torch
from torch import nn

from hosl.split.onnx_export.block_functions import BlockFunction
from hosl.split.onnx_export.tracing import Sizes, traced

_INDEX = "layer_i"
"""What the names hold of attributes that number the blocks: `layer_idx`, `layer_id`."""


def kinds_of(functions: list[BlockFunction], sizes: Sizes, width: int) -> tuple[str, ...]:
    """The kind of each block, `0`, `1`, ... in order of first appearance.

    Blocks are of one kind if they have the same modules, settings, constants and arguments. A block's number is no
    setting, unless the first and the last block that differ in it alone compute different things.
    """
    keys = [_outline(function) for function in functions]
    for key in set(keys):
        alike = [i for i, other in enumerate(keys) if other == key]
        if len(alike) > 1 and len({_code(functions[i], sizes, width) for i in (alike[0], alike[-1])}) > 1:
            for i in alike:
                keys[i] += f" {i}"
    numbers = {key: str(number) for number, key in enumerate(dict.fromkeys(keys))}
    return tuple(numbers[key] for key in keys)


def _outline(function: BlockFunction) -> str:
    """Everything that a block's function depends on, but its weights and its number."""
    parts = list(_parts(function.block))
    return sha256(repr([function.call.outline, parts]).encode()).hexdigest()


def _parts(block: nn.Module) -> Iterator[Any]:
    for name, module in block.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if key[0] != "_" and _INDEX not in key and isinstance(value, str | int | float | tuple | None)
        }
        shapes = [(key, p.shape) for key, p in module.named_parameters(recurse=False)]
        buffers = [(key, _digest(b)) for key, b in module.named_buffers(recurse=False)]
        yield name, type(module), settings, shapes, buffers


def _digest(tensor: torch.Tensor) -> str:
    return sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _code(function: BlockFunction, sizes: Sizes, width: int) -> str:
    graph, _ = traced(function.forward, function.examples(sizes, width))
    constants = [_digest(t) for _, t in sorted(graph.named_buffers())]
    constants += [(key, _digest(t)) for key, t in sorted(vars(graph).items()) if isinstance(t, torch.Tensor)]
    return f"{graph.code} {constants}"
