"""Conversion between PyTorch tensors and the wire's arrays, bit for bit; bfloat16 as 16-bit integers."""

from typing import Any

import numpy as np
import torch

from hosl.wire.tensors import WireArray


def to_wire(tensor: torch.Tensor) -> WireArray:
    """A tensor as an array for the wire; shares memory where it can. Requires: float32, float64 or bfloat16."""
    plain = tensor.detach().contiguous().cpu()
    name: Any = str(plain.dtype).removeprefix("torch.")
    if plain.dtype == torch.bfloat16:
        return WireArray(plain.view(torch.int16).numpy().view(np.uint16), name)
    return WireArray(plain.numpy(), name)


def from_wire(array: WireArray) -> torch.Tensor:
    """An array from the wire as a tensor; shares memory."""
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.data)
