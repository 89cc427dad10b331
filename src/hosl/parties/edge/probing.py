"""Probes on the engine: weights at theta + epsilon u and theta - epsilon u, formed in scratch; theta is only read.

One block's perturbed weights exist at a time. The random bits of a block are drawn once and read for both signs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from hosl.core.directions import Distribution, Drawn, direction_rows, drawn
from hosl.parties.edge.half import EdgeHalf

_PIECE_ELEMENTS = 1 << 16
"""The elements of u in memory at once, in scratch that stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One direction at one scale: theta +- epsilon u(seed)."""

    seed: int
    epsilon: float
    distribution: Distribution


class Scratch:
    """Memory in which the perturbed weights of a block are formed; it grows to the largest one's."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.float32)
        self._piece = np.empty(0, np.float32)

    def tiles(self, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """An array of the shape of each weight; earlier ones are overwritten."""
        total = sum(weight.size for weight in weights.values())
        if self._memory.size < total:
            self._memory = np.empty(0, np.float32)  # freed before the larger one is allocated
            self._memory = np.empty(total, np.float32)
        found, start = dict[str, np.ndarray](), 0
        for name, weight in weights.items():
            found[name] = self._memory[start : start + weight.size].reshape(weight.shape)
            start += weight.size
        return found

    def form_(self, tile: np.ndarray, weight: np.ndarray, u: Drawn, sign: int) -> None:
        """tile = weight + sign u, piece by piece."""
        flat, shifted = weight.reshape(-1), tile.reshape(-1)
        combine = np.add if sign > 0 else np.subtract
        width = weight.shape[-1]
        size = min(
            max(_PIECE_ELEMENTS // width, 1) * width, len(flat)
        )  # whole rows, which rank one draws at once
        if len(self._piece) < size:
            self._piece = np.empty(size, np.float32)
        for first, last in pairwise([*range(0, len(flat), size), len(flat)]):
            piece = self._piece[: last - first]
            u.fill(first, last, piece)
            combine(flat[first:last], piece, out=shifted[first:last])


class Perturbed:
    """A `Reads` of a half at theta + sign epsilon u: of what is trained; all else as it is."""

    def __init__(
        self,
        half: EdgeHalf,
        trained: Collection[str],
        probe: Probe,
        sign: int,
        draws: "Draws",
        scratch: Scratch,
    ) -> None:
        self._half, self._trained, self._probe, self._sign = half, trained, probe, sign
        self._draws, self._scratch = draws, scratch

    def array(self, name: str) -> np.ndarray:
        """A parameter by its name in the half, perturbed in memory of its own if it is trained."""
        weight = self._half.array(name)
        if name not in self._trained:
            return weight
        tile = np.empty_like(weight)
        self._scratch.form_(tile, weight, self._draws.of(name, weight.shape), self._sign)
        return tile

    def rows(self, name: str, indices: np.ndarray) -> np.ndarray:
        """Some rows of a table; of u, too, only these are drawn."""
        rows, probe = self._half.rows(name, indices), self._probe
        if name not in self._trained:
            return rows
        shape = self._half.weights.shape(name)
        u = direction_rows(probe.seed, name, shape, indices.tolist(), probe.distribution)
        u *= np.float32(probe.epsilon)
        return rows + u if self._sign > 0 else rows - u


class Draws:
    """epsilon u of one probe, tensor by tensor: drawn at the first sign, read again at the second, then let go of."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._kept: dict[str, Drawn] = {}

    def of(self, name: str, shape: Sequence[int]) -> Drawn:
        """epsilon u of one tensor."""
        if name not in self._kept:
            probe = self._probe
            self._kept[name] = drawn(probe.seed, name, shape, probe.distribution, probe.epsilon)
        return self._kept[name]

    def forget(self) -> None:
        """Let go of what was drawn."""
        self._kept.clear()


def perturbed_block(
    half: EdgeHalf, index: int, trained: Collection[str], draws: Draws, sign: int, scratch: Scratch
) -> dict[str, np.ndarray]:
    """The weights of one block at theta + sign epsilon u, by the inputs of its graph; valid until the next call."""
    weights = half.block_weights(index)
    names = {place: half.parameter(index, place) for place in weights}
    moved = {place: weights[place] for place, name in names.items() if name in trained}
    tiles = scratch.tiles(moved)
    for place, weight in moved.items():
        scratch.form_(tiles[place], weight, draws.of(names[place], weight.shape), sign)
    return weights | tiles
