"""Arrays <-> bytes: dtypes, compression, and the checks that come before any allocation.

`WireArray` is a numpy array that knows its dtype: numpy has no bfloat16, so those travel as uint16.
Compression: none; bf16, rounded to nearest; int8 per token with stochastic rounding, unbiased (methods.md (g)). The
noise comes from a key, so that both probes of a direction can be rounded by the same noise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, Literal, TypeAlias

import numpy as np

from hosl.errors import LimitError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum, to_enum

DTypeName: TypeAlias = Literal["float32", "bfloat16", "float64"]
Compression: TypeAlias = Literal["none", "bf16", "int8"]

CHUNK_BYTES = 1 << 19
"""The largest part of a tensor that one message carries."""
_KEPT_FROM_BYTES = 1 << 16
"""Chunks of so many bytes are copied when the tensor is whole; smaller ones at once, they are not worth a list."""
_DELIMITED = 2
"""The wire type of a field of bytes in protobuf's encoding: a length, then as many bytes."""

_STORED: dict[str, Any] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float64": np.dtype("<f8"),
}
"""The numpy dtype that stores the elements of each dtype, little-endian."""


@dataclass(frozen=True, slots=True, eq=False)
class WireArray:
    """A numpy array with the dtype of the numbers that it stores."""

    data: np.ndarray
    """The elements in float32 or float64, or the bits of bfloat16 in uint16."""
    dtype: DTypeName

    def widened(self) -> np.ndarray:
        """The numbers in their own dtype, or in float32 for bfloat16."""
        return _from_bfloat16(self.data) if self.dtype == "bfloat16" else self.data

    def finite(self) -> bool:
        """Whether no element is NaN or infinite."""
        if self.dtype == "bfloat16":
            return bool(((self.data & 0x7F80) != 0x7F80).all())
        return bool(np.isfinite(self.data).all())

    def largest(self) -> float:
        """The largest magnitude of an element. Requires: all are finite."""
        if self.dtype == "bfloat16":
            return float(_from_bfloat16((self.data & 0x7FFF).max(keepdims=True)).max())
        return float(max(self.data.max(), -self.data.min()))


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A tensor ready to be sent: its header, and its bytes."""

    header: pb.Tensor
    parts: tuple[memoryview, ...]

    @property
    def size_bytes(self) -> int:
        """The number of the tensor's own bytes, without framing."""
        return sum(len(part) for part in self.parts)

    def chunks(self) -> Iterator[bytes]:
        """The bytes in order, in pieces of at most `CHUNK_BYTES`."""
        for part in self.parts:
            for start in range(0, len(part), CHUNK_BYTES):
                yield bytes(part[start : start + CHUNK_BYTES])


def pack(array: WireArray, compression: Compression, *, noise: str = "") -> Packed:
    """Make an array ready for the wire.

    Args:
        array: [rows, seq, width].
        compression: bf16 and int8 apply to float32 and float64; a bfloat16 array goes as it is under bf16.
        noise: the key of int8's rounding noise; the same key gives the same noise.
    """
    if array.dtype == "bfloat16" and compression == "bf16":
        compression = "none"
    header = pb.Tensor(
        shape=array.data.shape,
        dtype=to_enum(pb.DType, array.dtype),
        compression=to_enum(pb.Compression, compression),
    )
    match compression:
        case "none":
            parts = (np.ascontiguousarray(array.data),)
        case "bf16":
            parts = (to_bfloat16(array.data.astype(np.float32, copy=False)),)
        case "int8":
            parts = _to_int8(array.widened().astype(np.float32, copy=False), noise)
    flat: list[Any] = [part.reshape(-1).view(np.uint8) for part in parts]
    return Packed(header, tuple(memoryview(part).toreadonly() for part in flat))


def packed_bytes(shape: tuple[int, ...], dtype: DTypeName, compression: Compression) -> int:
    """The number of bytes of an array of `shape` on the wire, without framing."""
    match compression:
        case "none":
            return prod(shape) * _STORED[dtype].itemsize
        case "bf16":
            return prod(shape) * 2
        case "int8":
            return prod(shape) + prod(shape[:-1]) * 4


def lone_chunk(message: bytes, kind: Any) -> memoryview | None:
    """The bytes of a message that consists of its field `chunk` alone, in place; None: it is another message.

    protobuf's parser would copy them twice, which is most of what a server's event loop does for a large tensor.

    Args:
        message: as it came.
        kind: a message type whose field `chunk` is of bytes, with a number below 16: its tag is then one byte.
    """
    if len(message) < 2 or message[0] != kind.CHUNK_FIELD_NUMBER << 3 | _DELIMITED:
        return None
    length, begin = 0, 1
    for shift in range(0, 35, 7):  # a length takes five bytes at most
        if begin == len(message):
            return None
        byte = message[begin]
        length |= (byte & 0x7F) << shift
        begin += 1
        if not byte & 0x80:
            return memoryview(message)[begin:] if begin + length == len(message) else None
    return None


class Unpacking:
    """A tensor that is being received: checked against its header, filled by chunks, never larger than announced."""

    def __init__(self, header: pb.Tensor, *, tensor_bytes: int) -> None:
        """Check the header before any of the tensor's bytes arrive.

        Raises:
            WireError: if its shape, dtype or compression is not allowed.
            LimitError: if the tensor is larger than `tensor_bytes`, as sent or unpacked.
        """
        self.dtype: Any = from_enum(pb.DType, header.dtype)
        self.compression: Any = from_enum(pb.Compression, header.compression)
        self.shape = tuple(header.shape)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise WireError(f"a tensor needs three dimensions of at least 1, got {list(self.shape)}")
        if self.compression == "bf16" and self.dtype == "bfloat16":
            raise WireError("a bfloat16 tensor is not compressed to bf16 a second time")
        self.wanted = packed_bytes(self.shape, self.dtype, self.compression)
        largest = max(self.wanted, prod(self.shape) * _STORED[self.dtype].itemsize)
        if largest > tensor_bytes:
            raise LimitError(
                f"a tensor {list(self.shape)} of {self.dtype} takes {largest} bytes; the limit is {tensor_bytes}: "
                "send fewer rows, or raise the server's --tensor-limit"
            )
        unpacked = 0 if self.compression == "none" else largest
        self.takes_bytes = self.wanted + unpacked
        """The memory of the tensor as sent and, if that is another, unpacked; not what unpacking takes for a moment."""
        # np.empty takes no memory yet: the system gives a page when bytes are written to it
        self._bytes = np.empty(self.wanted, dtype=np.uint8)
        self._kept: list[tuple[int, bytes | memoryview]] = []
        """Chunks that are copied when the tensor is whole, by whoever unpacks it; each with its place."""
        self.filled = 0

    def add(self, chunk: bytes | memoryview) -> None:
        """Append the next bytes.

        Raises:
            WireError: if there are none, or more than announced.
        """
        end = self.filled + len(chunk)
        if end > self.wanted or not chunk:
            raise WireError(
                f"a tensor {list(self.shape)} needs {self.wanted} bytes, {end} arrived"
                if chunk
                else "an empty chunk; a chunk holds at least one byte"
            )
        if len(chunk) < _KEPT_FROM_BYTES:
            self._place(self.filled, chunk)
        else:
            self._kept.append((self.filled, chunk))
        self.filled = end

    @property
    def complete(self) -> bool:
        """Whether every byte has arrived."""
        return self.filled == self.wanted

    def array(self) -> WireArray:
        """The tensor, [rows, seq, width].

        Raises:
            WireError: if bytes are missing, or an element is NaN or infinite.
        """
        if not self.complete:
            raise WireError(
                f"a tensor {list(self.shape)} needs {self.wanted} bytes, only {self.filled} arrived"
            )
        while self._kept:
            self._place(*self._kept.pop())  # and let go of it: the tensor is in memory once
        array = WireArray(self._unpacked().reshape(self.shape), self.dtype)
        if not array.finite():
            raise WireError(
                "a tensor holds NaN or Inf; the sender has diverged: lower its learning rate or epsilon"
            )
        return array

    def _place(self, begin: int, chunk: bytes | memoryview) -> None:
        self._bytes[begin : begin + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)

    def _unpacked(self) -> np.ndarray:
        match self.compression:
            case "none":
                return self._bytes.view(_STORED[self.dtype])
            case "bf16":
                return _from_bfloat16(self._bytes.view("<u2")).astype(_STORED[self.dtype], copy=False)
            case _:
                tokens = prod(self.shape[:-1])
                scales = self._bytes[: tokens * 4].view("<f4")
                values = self._bytes[tokens * 4 :].view(np.int8).reshape(tokens, -1)
                with np.errstate(over="ignore", invalid="ignore"):  # such bytes are refused when it is whole
                    whole = values * scales[:, None]
                return (
                    to_bfloat16(whole)
                    if self.dtype == "bfloat16"
                    else whole.astype(_STORED[self.dtype], copy=False)
                )


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to nearest, ties to even; uint16. NaN stays NaN."""
    bits = np.ascontiguousarray(values).view("<u4")
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    wide = bits.astype("<u4")
    wide <<= 16  # in place: an activation may be large
    return wide.view("<f4")


def _to_int8(values: np.ndarray, noise: str) -> tuple[np.ndarray, np.ndarray]:
    """(scales, integers): one float32 scale per token; values / scale, rounded up or down at random, unbiased."""
    tokens = values.reshape(-1, values.shape[-1])
    scales = (np.abs(tokens).max(axis=1) / np.float32(127)).astype("<f4")
    divisors = np.where(scales > 0, scales, np.float32(1))
    key = np.frombuffer(blake2b(f"hosl/noise/{noise}".encode(), digest_size=16).digest(), dtype="<u8")
    uniform = np.random.Generator(np.random.Philox(key=key))
    rounded = np.empty(tokens.shape, dtype=np.int8)
    for index, (row, divisor) in enumerate(zip(tokens, divisors, strict=True)):
        steps = np.floor(row / divisor + uniform.random(len(row), dtype=np.float32))
        rounded[index] = np.clip(steps, -127, 127)
    return scales, rounded
