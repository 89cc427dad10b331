"""Tensors read and written one at a time; the safetensors library's own writer needs all of them in memory at once.

The format (safetensors' README): header length as uint64, the JSON header padded with spaces to 8 bytes, then the
tensors' bytes without gaps. The library reads these files.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor that can be read when its turn comes."""

    name: str
    dtype: str
    """The dtype's name in safetensors, such as F32."""
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        """The size of its elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(path: Path, sources: Sequence[Source]) -> str:
    """Write `sources` to a safetensors file, in the order of their names; returns `tensors_digest` of them."""
    ordered, offset = sorted(sources, key=lambda source: source.name), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for source in ordered:
        end = offset + source.size_bytes
        header[source.name] = {
            "dtype": source.dtype,
            "shape": list(source.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = sha256()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for source in ordered:
            tensor = source.read()
            add_to_digest(digest, source.name, tensor)
            file.write(_bytes(tensor))
    return digest.hexdigest()


def tensors_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names."""
    digest = sha256()
    for name in sorted(tensors):
        add_to_digest(digest, name, tensors[name])
    return digest.hexdigest()


def add_to_digest(digest: Any, name: str, tensor: torch.Tensor) -> None:
    """Have a digest read on with a tensor: its name, dtype, shape and bytes."""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
