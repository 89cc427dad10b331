"""u(seed): random directions from a counter, any tile of any tensor on its own, the same bits on every machine.

A direction is never stored. Each tensor of a half has its own stream of random bits, Philox-4x64-10 (Salmon et al.,
2011) under a key made of seed and tensor name, so tiles can be drawn in any order and two halves never share one.
Bits become numbers by integer operations and one table, not by the machine's logarithm: that is what keeps them equal.
Which seeds a run uses: `direction_seed`. What is done with u: `hosl.parties` (probes), `direction_sum` (updates).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b, sha256
from statistics import NormalDist
from typing import Literal, TypeAlias, get_args

import numpy as np

from hosl.core.shapes import Float

Law: TypeAlias = Literal["gaussian", "rademacher", "sphere"]
"""gaussian: N(0, 1) (the paper). rademacher: +-1, ten times cheaper. sphere: gaussian rescaled per tensor to
norm sqrt(numel) (the authors' code, paper.md section 11). All have E[u u^T] = I."""

LAWS: tuple[Law, ...] = get_args(Law)

TILE_ELEMENTS = 1 << 18
"""How much of a tensor is drawn at a time: 1 MiB of float32, and a multiple of every law's block."""

_WORDS_PER_BLOCK = 4  # one Philox counter value gives four 64-bit words
_BITS_PER_ELEMENT: dict[Law, int] = {"gaussian": 16, "sphere": 16, "rademacher": 1}
_TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


def direction_seed(run_seed: int, step: int, q: int, half: str = "client") -> int:
    """A 63-bit seed for direction q of a step; the same on every machine, collisions only by chance.

    The two halves of zo-zo ask with their own name and so draw independent directions (paper.md I7), and so may several
    clients of one run.
    """
    text = f"hosl/{half}/{run_seed}/{step}/{q}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=1)
def gaussian_table() -> Float[np.ndarray, "65536"]:
    """The 2^16 equally likely values of the gaussian law: quantile midpoints of N(0, 1), scaled to variance 1.

    Its distribution function is within 2^-17 of N(0, 1)'s; the largest value is 4.32 (a true normal exceeds it
    once in 65,000 draws). Moments: mean 0 exactly, variance 1, kurtosis 2.999. float32.

    Raises:
        AssertionError: if this machine's arithmetic gives other bits than the ones every other machine has.
    """
    half = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768)]
    scale = 1.0 / math.sqrt(math.fsum(z * z for z in half) / 32768)
    lower = np.array([z * scale for z in half], dtype=np.float32)
    table = np.concatenate([lower, -lower[::-1]])
    digest = sha256(table.astype("<f4").tobytes()).hexdigest()
    assert digest == _TABLE_SHA256, f"the gaussian table has digest {digest}, expected {_TABLE_SHA256}"
    table.flags.writeable = False
    return table


def tile(seed: int, name: str, start: int, stop: int, law: Law) -> Float[np.ndarray, " elements"]:
    """Elements start..stop-1 of u(seed) for the tensor called `name`, flattened row by row; float32.

    Requires: law is gaussian or rademacher; `sphere` needs the whole tensor's norm (`sphere_scale`).
    """
    per_word = 64 // _BITS_PER_ELEMENT[law]
    per_block = per_word * _WORDS_PER_BLOCK
    first_block, skip = divmod(start, per_block)
    words = -(-(skip + stop - start) // per_word)
    bits = (
        np.random.Philox(key=_key(seed, name), counter=first_block)
        .random_raw(words)
        .astype("<u8", copy=False)
    )
    if law == "rademacher":
        signs = np.unpackbits(bits.view(np.uint8), bitorder="little")[skip : skip + stop - start]
        return (signs.astype(np.float32) * np.float32(2)) - np.float32(1)
    return gaussian_table().take(bits.view("<u2")[skip : skip + stop - start], mode="clip")


def sphere_scale(seed: int, name: str, elements: int, law: Law) -> float:
    """What to multiply a tensor's gaussian u with so that its norm is sqrt(elements); 1 for the other laws."""
    return _sphere_scale(seed, name, elements) if law == "sphere" else 1.0


def direction(seed: int, name: str, shape: Sequence[int], law: Law) -> Float[np.ndarray, "..."]:
    """u(seed) for one whole tensor; float32. Allocates the tensor's size."""
    elements = math.prod(shape)
    u = tile(seed, name, 0, elements, law)
    if law == "sphere":
        u *= np.float32(sphere_scale(seed, name, elements, law))
    return u.reshape(shape)


def direction_rows(
    seed: int, name: str, shape: Sequence[int], rows: Sequence[int], law: Law
) -> Float[np.ndarray, "rows width"]:
    """The given rows of u(seed) for a matrix of `shape`, without drawing the others; float32."""
    height, width = shape
    u = np.empty((len(rows), width), dtype=np.float32)
    for place, row in enumerate(rows):
        u[place] = tile(seed, name, row * width, (row + 1) * width, law)
    if law == "sphere":
        u *= np.float32(sphere_scale(seed, name, height * width, law))
    return u


def direction_sum(
    name: str,
    start: int,
    stop: int,
    elements: int,
    seeds: Sequence[int],
    scales: Sequence[float],
    law: Law,
    dtype: type,
) -> Float[np.ndarray, " elements"]:
    """sum_q scale_q u(seed_q) over one tile of a tensor of `elements`; the subtrahend of l.8.

    Summed in the order of `seeds`, in `dtype` (float32, or float64 for float64 weights), by separate multiplications
    and additions, so that every machine rounds alike.
    """
    total = np.zeros(stop - start, dtype=dtype)
    for seed, scale in zip(seeds, scales, strict=True):
        u = tile(seed, name, start, stop, law).astype(dtype, copy=False)
        u *= dtype(scale * sphere_scale(seed, name, elements, law))
        total += u
    return total


def tiles(elements: int) -> list[tuple[int, int]]:
    """(start, stop) of the tiles of a tensor, in order."""
    return [(start, min(start + TILE_ELEMENTS, elements)) for start in range(0, elements, TILE_ELEMENTS)]


def _key(seed: int, name: str) -> np.ndarray:
    return np.frombuffer(blake2b(f"hosl/u/{seed}/{name}".encode(), digest_size=16).digest(), dtype="<u8")


@lru_cache(maxsize=4096)
def _sphere_scale(seed: int, name: str, elements: int) -> float:
    square = math.fsum(
        float(np.square(tile(seed, name, start, stop, "sphere"), dtype=np.float64).sum())
        for start, stop in tiles(elements)
    )
    return math.sqrt(elements / square)
