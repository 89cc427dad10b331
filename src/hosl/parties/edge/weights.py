"""The weights of a half as mapped pages of its file: read from the disk where they are used, written in private.

Pages that were only read belong to the file, and the system may drop them; a page that training has written is this
process's own (`mmap.ACCESS_COPY`), and the file never changes.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hosl.errors import ModelError
from hosl.system.safetensors_file import Stored, file_digest, stored_tensors, widened


class MappedWeights:
    """The tensors of a safetensors file.

    Holds the pages that were touched, and float32 copies of trained tensors that are stored in 16 bits.
    """

    def __init__(self, file: Path) -> None:
        """Map the file; no tensor is read yet.

        Raises:
            ModelError: if it is missing, cut short or not of the format.
        """
        self.file = file
        self.stored: dict[str, Stored] = stored_tensors(file)
        """The place of each tensor, by name."""
        try:
            self._descriptor = os.open(file, os.O_RDONLY)
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as cause:
            raise ModelError(f"{file} cannot be mapped: {cause}; split the model again") from cause
        self._own: dict[str, np.ndarray] = {}

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.stored[name].shape

    def array(self, name: str) -> np.ndarray:
        """A tensor in float32, or int8 where it is stored so: a view of the mapped pages, or of 16 bits a new copy."""
        if name in self._own:
            return self._own[name]
        bits = self._bits(name)
        return widened(bits) if self.stored[name].dtype in ("BF16", "F16") else bits

    def trained_(self, name: str) -> np.ndarray:
        """A tensor in float32 that may be written: every later `array` and `rows` has what was written."""
        if name not in self._own:
            own = self.array(name)
            own.flags.writeable = True
            self._own[name] = own
        return self._own[name]

    def rows(self, name: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Some rows of a matrix [rows, width] in float32, [len(indices), width].

        They are read from the file, not through its mapping, which would make the pages around them resident, too.
        """
        if name in self._own:
            return self._own[name][indices]
        stored = self.stored[name]
        width = stored.shape[1] * stored.numpy_dtype.itemsize
        found = np.empty((len(indices), stored.shape[1]), stored.numpy_dtype)
        for row, index in zip(found, indices, strict=True):
            os.preadv(self._descriptor, [row.view(np.uint8).data], stored.start + int(index) * width)
        return widened(found) if stored.dtype in ("BF16", "F16") else found

    def release(self, names: Sequence[str]) -> None:
        """Let go of the whole pages that hold nothing but these tensors; they are read again when needed.

        Trained tensors keep their pages, which nothing could read again.
        """
        spans = sorted(self._span(name) for name in names if name not in self._own)
        while spans:
            start, stop = spans.pop(0)
            while spans and spans[0][0] == stop:  # neighbours share a page
                stop = spans.pop(0)[1]
            first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def digest(self) -> str:
        """The digest of all tensors as they are stored (`tensors_digest`), read without mapping a page."""
        return file_digest(self.stored, lambda count, offset: os.pread(self._descriptor, count, offset))

    def _bits(self, name: str) -> np.ndarray:
        stored = self.stored[name]
        flat = np.frombuffer(self._map, stored.numpy_dtype, stored.elements, stored.start)
        bits = flat.reshape(stored.shape)
        bits.flags.writeable = (
            False  # a write would go unseen: the page would be private, and may be let go of
        )
        return bits

    def _span(self, name: str) -> tuple[int, int]:
        stored = self.stored[name]
        return stored.start, stored.start + stored.size_bytes
