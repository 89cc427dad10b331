"""The client's state as a log: base weights + the ordered (step, seed, scale) rebuild the half bit for bit.

One entry is one direction of one update, theta_c -= scale * u(seed), in 16 bytes and no header (docs/adr/0002):

    offset 0   step    uint32, little-endian; never falls
    offset 4   seed    uint64
    offset 12  scale   float32; eta c / Q of Alg. 1, line 8; finite

Entries of one step are summed before they are subtracted (`directions.direction_sum`), as the update did.
Distribution, base weights and tensor names are in the checkpoint (`hosl.system.checkpoint`). Source: methods.md (d).
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from hosl.errors import JournalError

ENTRY = np.dtype([("step", "<u4"), ("seed", "<u8"), ("scale", "<f4")])
"""Layout of an entry; 16 bytes, no padding."""


class Journal:
    """An append-only list of updates: 16 bytes per direction on disk, and up to twice as many in memory."""

    def __init__(self) -> None:
        self._room = np.empty(0, dtype=ENTRY)
        """The entries, and room behind them for more."""
        self._length = 0

    def __len__(self) -> int:
        """The number of directions that have been applied."""
        return self._length

    def append(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """Add one update: all directions of `step`.

        Raises:
            JournalError: if the step does not follow the last one, or a scale is not finite. Nothing is added then.
        """
        entries = np.empty(len(seeds), dtype=ENTRY)
        entries["step"], entries["seed"], entries["scale"] = step, seeds, scales
        self._check(entries, after=self.last_step)
        whole = self._length + len(entries)
        if whole > len(self._room):  # twice as much: a long run must not copy all its entries at each step
            room = np.empty(max(whole, 2 * len(self._room)), dtype=ENTRY)
            room[: self._length] = self._entries()
            self._room = room
        self._room[self._length : whole] = entries
        self._length = whole

    @property
    def last_step(self) -> int:
        """The step of the newest entry; 0 when there is none."""
        return int(self._room["step"][self._length - 1]) if self._length else 0

    def updates(self, after: int = 0) -> Iterator[tuple[int, tuple[int, ...], tuple[float, ...]]]:
        """(step, seeds, scales) of every update later than step `after`, in the order of application."""
        entries = self._entries()
        newer = entries[bisect_right(entries["step"], after) :]  # by halves: all of them may be millions
        begins = [0, *(np.flatnonzero(np.diff(newer["step"])) + 1).tolist(), len(newer)]
        for begin, end in pairwise(begins) if len(newer) else ():
            rows = newer[begin:end]
            yield int(rows["step"][0]), tuple(rows["seed"].tolist()), tuple(rows["scale"].tolist())

    def to_bytes(self) -> bytes:
        """The entries, one after the other."""
        return self._entries().tobytes()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Journal":
        """A journal of the entries in `data`.

        Raises:
            JournalError: if the length is no multiple of 16, steps fall, or a scale is not finite.
        """
        whole = len(data) // ENTRY.itemsize * ENTRY.itemsize
        if len(data) != whole:
            raise JournalError(
                f"a journal holds whole entries of {ENTRY.itemsize} bytes, this one has {len(data)} bytes: its tail "
                f"is torn; keep the first {whole} bytes or resume from a checkpoint"
            )
        entries = np.frombuffer(data, dtype=ENTRY)
        cls._check(entries, after=0)
        journal = cls()
        journal._room, journal._length = entries.copy(), len(entries)
        return journal

    def _entries(self) -> np.ndarray:
        return self._room[: self._length]

    @staticmethod
    def _check(entries: np.ndarray, after: int) -> None:
        steps = entries["step"].astype(np.int64)
        falls = np.flatnonzero(np.diff(np.concatenate([[after], steps])) < 0)
        if falls.size:
            raise JournalError(
                f"steps of a journal never fall: entry {falls[0]} has step {steps[falls[0]]} after a later one"
            )
        wrong = np.flatnonzero(~np.isfinite(entries["scale"]))
        if wrong.size:
            raise JournalError(
                f"entry {wrong[0]} (step {steps[wrong[0]]}) has a scale that is not a finite number"
            )
