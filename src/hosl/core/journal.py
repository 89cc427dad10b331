"""The client's state as a log: base weights + the ordered (step, seed, scale) rebuild the half bit for bit.

One entry is one direction of one update, theta_c -= scale * u(seed), in 16 bytes and no header (docs/adr/0002):

    offset 0   step    uint32, little-endian; never falls
    offset 4   seed    uint64
    offset 12  scale   float32; eta c / Q of Alg. 1, line 8; finite

Entries of one step are summed before they are subtracted (`directions.direction_sum`), as the update did.
Distribution, base weights and tensor names are in the checkpoint (`hosl.system.checkpoint`). Source: methods.md (d).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from hosl.errors import JournalError

ENTRY = np.dtype([("step", "<u4"), ("seed", "<u8"), ("scale", "<f4")])
"""Layout of an entry; 16 bytes, no padding."""


class Journal:
    """An append-only list of updates. Holds 16 bytes per direction in memory and on disk."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def __len__(self) -> int:
        """The number of directions that have been applied."""
        return len(self._bytes) // ENTRY.itemsize

    def append(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """Add one update: all directions of `step`.

        Raises:
            JournalError: if the step does not follow the last one, or a scale is not finite. Nothing is added then.
        """
        entries = np.empty(len(seeds), dtype=ENTRY)
        entries["step"], entries["seed"], entries["scale"] = step, seeds, scales
        self._check(entries, after=self.last_step)
        self._bytes += entries.tobytes()

    @property
    def last_step(self) -> int:
        """The step of the newest entry; 0 when there is none."""
        return int(self._entries()["step"][-1]) if self._bytes else 0

    def updates(self, after: int = 0) -> Iterator[tuple[int, tuple[int, ...], tuple[float, ...]]]:
        """(step, seeds, scales) of every update later than step `after`, in the order of application."""
        entries = self._entries()
        for step, group in groupby(entries[entries["step"] > after], key=lambda entry: int(entry["step"])):
            rows = list(group)
            yield step, tuple(int(r["seed"]) for r in rows), tuple(float(r["scale"]) for r in rows)

    def to_bytes(self) -> bytes:
        """The entries, one after the other."""
        return bytes(self._bytes)

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
        cls._check(np.frombuffer(data, dtype=ENTRY), after=0)
        journal = cls()
        journal._bytes = bytearray(data)
        return journal

    def _entries(self) -> np.ndarray:
        return np.frombuffer(bytes(self._bytes), dtype=ENTRY)

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
