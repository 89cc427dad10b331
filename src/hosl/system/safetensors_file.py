"""The safetensors format over numpy: the header of a file, arrays written one at a time, their digest. No torch.

The library's own writer for numpy holds a second copy of everything that it writes. Digests are those of
`hosl.split.reading.tensors`: one tensor has the same one in either runtime.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hosl.errors import ModelError

_HEADER_BYTES = 100_000_000
"""The largest header that the safetensors library reads."""

_DTYPES: dict[str, tuple[str, type]] = {
    "F64": ("float64", np.float64), "F32": ("float32", np.float32), "F16": ("float16", np.float16),
    "BF16": ("bfloat16", np.uint16), "I64": ("int64", np.int64), "I32": ("int32", np.int32),
    "I16": ("int16", np.int16), "I8": ("int8", np.int8), "U8": ("uint8", np.uint8), "BOOL": ("bool", np.bool_),
}  # fmt: skip
"""By safetensors' name: torch's name, for digests, and numpy's type; numpy has no bfloat16: its bits."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor's place in a file."""

    dtype: str
    """The dtype's name in safetensors, such as F32."""
    shape: tuple[int, ...]
    start: int
    """The offset of its first byte in the file."""

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of its bits in numpy; of bfloat16, uint16."""
        return np.dtype(_DTYPES[self.dtype][1])

    @property
    def size_bytes(self) -> int:
        """The size of its elements."""
        return self.elements * self.numpy_dtype.itemsize


def stored_tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name, in the order of the header.

    Raises:
        ModelError: if there is no such file, or it is cut short or otherwise not of the format.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(_HEADER_BYTES, size - 8):
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        return {
            name: _stored(name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as cause:
        raise ModelError(f"{path} cannot be read: {cause}; split the model again") from cause


def _stored(name: str, entry: Mapping[str, Any], data: int, size: int) -> Stored:
    start, stop = entry["data_offsets"]
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
    stored = Stored(entry["dtype"], tuple(int(n) for n in entry["shape"]), data + int(start))
    if min((start, *stored.shape), default=0) < 0 or stop - start != stored.size_bytes or data + stop > size:
        raise ValueError(f"{name} {stored.shape} does not have its bytes in the file: it is cut short")
    return stored


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a safetensors file, in the order of their names, none of them copied.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    names = {np.dtype(numpy): name for name, (_, numpy) in _DTYPES.items() if name != "BF16"}
    header, offset = dict[str, Any](), 0
    for name in sorted(arrays):
        array, start = arrays[name], offset
        offset += array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(arrays):
            file.write(_bytes(arrays[name]))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as arrays; of bfloat16 as float32.

    Raises:
        ModelError: as in `stored_tensors`.
    """
    found = dict[str, np.ndarray]()
    with path.open("rb") as file:
        for name, stored in stored_tensors(path).items():
            array = np.empty(stored.shape, stored.numpy_dtype)
            file.seek(stored.start)
            file.readinto(_bytes(array))
            found[name] = widened(array) if stored.dtype == "BF16" else array
    return found


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 numbers from their bits (uint16), or float16 ones, as float32; exact."""
    if bits.dtype == np.float16:
        return bits.astype(np.float32)
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def arrays_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of the names: `tensors_digest` of equal tensors."""
    digest = sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} torch.{array.dtype.name} {array.shape}\n".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def file_digest(tensors: Mapping[str, Stored], read: Callable[[int, int], bytes]) -> str:
    """`tensors_digest` of the tensors of a file, read a MiB at a time; `read(count, offset)` gives its bytes."""
    digest = sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        digest.update(f"{name} torch.{_DTYPES[stored.dtype][0]} {stored.shape}\n".encode())
        stop = stored.start + stored.size_bytes
        for offset in range(stored.start, stop, 1 << 20):
            digest.update(read(min(1 << 20, stop - offset), offset))
    return digest.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
