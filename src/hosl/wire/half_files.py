"""A half on its way from disk to disk, in chunks: neither side holds more of it than one. No torch.

What arrives is one safetensors file that grows. A transfer that broke off goes on at the byte where it was; every
tensor is checked by its digest when its last byte is there, and again when a transfer goes on.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hosl.errors import FailureError, ModelError, WireError
from hosl.system.atomic import whole_file
from hosl.wire.halves import JOURNAL, GivenTensor, HalfListing
from hosl.wire.tensors import CHUNK_BYTES

_HEADER_BYTES = 100 << 20
"""The longest header of a safetensors file, as that library has it."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: where its bytes are."""

    name: str
    """Its name on the way, see `GivenTensor`."""
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    """The place of its first byte in the file."""
    size_bytes: int


def stored_tensors(file: Path, place: str) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by their names in it; on their way they are called place/NAME.

    Raises:
        ModelError: if it is no safetensors file.
    """
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, facts in header.items():
            begin, end = facts["data_offsets"]
            shape = tuple(facts["shape"])
            found[name] = StoredTensor(
                f"{place}/{name}", facts["dtype"], shape, file, 8 + length + begin, end - begin
            )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as cause:
        raise ModelError(f"{file} is cut short or damaged: {cause}") from cause
    return found


def stored_journal(file: Path, size: int) -> list[StoredTensor]:
    """The journal in the first `size` bytes of a file; nothing, where it is empty."""
    return [StoredTensor(JOURNAL, "U8", (size,), file, 0, size)] if size else []


class DepartingHalf:
    """A half to be sent: its list, and its bytes from any offset on. Its files stay readable if they are deleted."""

    def __init__(
        self, step: int, tensors: Sequence[StoredTensor], listing: HalfListing | None = None
    ) -> None:
        """Open the files, and read them once for the digests unless their `listing` is known."""
        self._tensors = sorted(tensors, key=lambda tensor: tensor.name)
        self._files: dict[Path, BinaryIO] = {}
        try:
            for file in {tensor.file for tensor in tensors}:
                self._files[file] = file.open("rb")
            self.listing = listing or HalfListing(
                step, tuple(self._given(tensor) for tensor in self._tensors)
            )
        except BaseException:
            self.close()
            raise

    def chunks(self, offset: int = 0) -> Iterator[bytes]:
        """The bytes of all tensors from `offset` on, in pieces of at most `CHUNK_BYTES`, none of two tensors.

        Raises:
            FailureError: if a file has become shorter.
        """
        for tensor in self._tensors:
            skipped = min(offset, tensor.size_bytes)
            offset -= skipped
            yield from self._read(tensor, skipped)

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()

    def _given(self, tensor: StoredTensor) -> GivenTensor:
        digest = sha256()
        for block in self._read(tensor, 0):
            digest.update(block)
        return GivenTensor(tensor.name, tensor.dtype, tensor.shape, digest.digest())

    def _read(self, tensor: StoredTensor, begin: int) -> Iterator[bytes]:
        descriptor = self._files[tensor.file].fileno()
        while begin < tensor.size_bytes:
            wanted = min(CHUNK_BYTES, tensor.size_bytes - begin)
            # by offset: several calls may read one file
            block = os.pread(descriptor, wanted, tensor.offset + begin)
            if not block:
                raise FailureError(f"{tensor.file} has become shorter while it was read; put it back")
            begin += len(block)
            yield block


class ArrivingHalf:
    """A half that arrives in a folder: `half.safetensors`, once every tensor of the list is there.

    A context manager, which closes the file; what has arrived stays for the next time.
    """

    def __init__(self, folder: Path, listing: HalfListing) -> None:
        """Go on with what the folder has of this list; what it has of another one is deleted.

        Raises:
            FailureError: if the disk lacks the room, or cannot be written.
        """
        self.listing, self.file = listing, folder / "half.safetensors"
        self._partial, known = folder / "half.partial", folder / "list.txt"
        folder.mkdir(parents=True, exist_ok=True)
        digest = listing.digest
        if not known.is_file() or known.read_text(encoding="utf-8", errors="replace") != digest:
            for old in (self._partial, self.file):
                old.unlink(missing_ok=True)
            whole_file(known, digest.encode())
        if self.file.is_file():
            self.file.replace(self._partial)  # it is checked like any other beginning
        header = _header(listing)
        self._begin = len(header)
        self._stream = open(self._partial, "a+b")  # noqa: SIM115
        try:
            if self._size() < self._begin or self._at(0, self._begin) != header:
                self._stream.truncate(0)
                self._stream.write(header)
                self._stream.flush()
            self._index, self._in_tensor, self._digest = 0, 0, sha256()
            self._take_up()
            lacking, free = listing.size_bytes - self.have, shutil.disk_usage(folder).free
            if lacking > free:
                raise FailureError(
                    f"{folder}: {lacking:,} bytes are to come, the disk has room for {free:,}; free some"
                )
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "ArrivingHalf":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def have(self) -> int:
        """The bytes that are here."""
        whole = sum(tensor.size_bytes for tensor in self.listing.tensors[: self._index])
        return whole + self._in_tensor

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return self._index == len(self.listing.tensors)

    def add(self, chunk: bytes) -> None:
        """Append the next bytes.

        Raises:
            WireError: if there are none, more than the list says, or a tensor's digest is another; the bytes of that
                tensor are then deleted.
            FailureError: if the disk is full or cannot be written.
        """
        if not chunk:
            raise WireError("an empty chunk; a chunk holds at least one byte")
        rest = memoryview(chunk)
        while rest:
            if self.complete:
                raise WireError("more bytes of a half arrived than its list says")
            due = self.listing.tensors[self._index].size_bytes - self._in_tensor
            part, rest = rest[:due], rest[due:]
            try:
                self._stream.write(part)
            except OSError as cause:
                raise FailureError(
                    f"{self._partial} could not be written: {cause.strerror}; what has arrived stays there"
                ) from cause
            self._digest.update(part)
            self._in_tensor += len(part)
            self._end_tensor()

    def finish(self) -> Path:
        """The file of the whole half; its tensors are named as in the list."""
        assert self.complete, "finish comes after the last byte"
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self.file)
        return self.file

    def _end_tensor(self) -> None:
        tensor = self.listing.tensors[self._index]
        if self._in_tensor < tensor.size_bytes:
            return
        if self._digest.digest() != tensor.sha256:
            self._drop_tensor()
            raise WireError(
                f"{tensor.name} of a half arrived with another digest than its list says; the same command asks again"
            )
        self._index, self._in_tensor, self._digest = self._index + 1, 0, sha256()

    def _drop_tensor(self) -> None:
        whole = sum(tensor.size_bytes for tensor in self.listing.tensors[: self._index])
        self._stream.truncate(self._begin + whole)
        self._in_tensor, self._digest = 0, sha256()

    def _take_up(self) -> None:
        """Count the bytes that are here, up to the first tensor that a disk or a person has damaged."""
        place, end = self._begin, self._size()
        while place < end and not self.complete:
            due = self.listing.tensors[self._index].size_bytes - self._in_tensor
            block = self._at(place, min(CHUNK_BYTES, due, end - place))
            self._digest.update(block)
            self._in_tensor += len(block)
            place += len(block)
            try:
                self._end_tensor()
            except WireError:
                return
        self._stream.truncate(place)

    def _size(self) -> int:
        return os.fstat(self._stream.fileno()).st_size

    def _at(self, place: int, count: int) -> bytes:
        return os.pread(self._stream.fileno(), count, place)


def _header(listing: HalfListing) -> bytes:
    """The beginning of a safetensors file of these tensors, in their order."""
    content, offset = dict[str, Any](), 0
    for tensor in listing.tensors:
        end = offset + tensor.size_bytes
        content[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
