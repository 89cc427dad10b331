"""u(seed): random directions from a counter, any tile of any tensor on its own, the same bits on every machine.

A direction is never stored. Each tensor of a half has its own stream of random bits, Philox-4x64-10 (Salmon et al.,
2011) under a key made of seed and tensor name, so tiles can be drawn in any order and two halves never share one.
Bits become numbers by integer operations and one table, not by the machine's logarithm: so they are equal everywhere.
The seeds of a run: `direction_seed`. The uses of u: probes in `hosl.parties`, updates by `direction_sum`.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b, sha256
from statistics import NormalDist
from typing import Literal, Protocol, TypeAlias, get_args, runtime_checkable

import numpy as np

from hosl.core.array_types import Float

Distribution: TypeAlias = Literal["gaussian", "rademacher", "sphere", "low-rank"]
"""gaussian: N(0, 1) (the paper). rademacher: +-1, cheaper. sphere: gaussian rescaled per tensor to norm sqrt(numel)
(the authors' code, paper.md section 11). low-rank: a b^T with a and b +-1 for a matrix, +-1 for a vector; all probes
of a step can share one pass over the weights. All have E[u u^T] = I."""

DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)

TILE_ELEMENTS = 1 << 18
"""The elements of a tensor drawn at a time: 1 MiB of float32, and a multiple of every distribution's block."""

_WORDS_PER_BLOCK = 4  # one Philox counter value gives four 64-bit words
_BITS_PER_ELEMENT: dict[Distribution, int] = {"gaussian": 16, "sphere": 16, "rademacher": 1, "low-rank": 1}
_TABLE_SHA256 = "8babbcaf96568f10165a1eab530c0e5c92d04de96761b6dbb3dadfa94baba37f"


def direction_seed(run_seed: int, step: int, q: int, half: str = "client") -> int:
    """A 63-bit seed for direction q of a step; the same on every machine, collisions only by chance.

    The two halves of zo-zo draw independent directions by their names in `half` (paper.md I7); so do several clients of
    one run.
    """
    text = f"hosl/{half}/{run_seed}/{step}/{q}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=1)
def gaussian_table() -> Float[np.ndarray, "65536"]:
    """The 2^16 equally likely values of the gaussian distribution: quantile midpoints of N(0, 1), scaled to variance 1.

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


def tile(
    seed: int, name: str, start: int, stop: int, distribution: Distribution
) -> Float[np.ndarray, " elements"]:
    """Elements start..stop-1 of u(seed) for the tensor called `name`, flattened row by row; float32.

    Requires: distribution is gaussian or rademacher; `sphere` needs the whole tensor's norm (`sphere_scale`), and
    low-rank its shape (`drawn`).
    """
    u = np.empty(stop - start, dtype=np.float32)
    _Entries(seed, name, start, stop, distribution, scale_table(distribution, 1.0, 1.0, np.float32)).fill(
        start, stop, u
    )
    return u


@runtime_checkable
class Drawn(Protocol):
    """scale x u(seed) of one tensor, or of a range of it: the random bits are drawn once and can be read many times."""

    def fill(self, start: int, stop: int, out: Float[np.ndarray, " elements"]) -> None:
        """Write elements start..stop-1 of the flattened tensor into `out`."""
        ...


def drawn(
    seed: int,
    name: str,
    shape: Sequence[int],
    distribution: Distribution,
    scale: float = 1.0,
    dtype: type = np.float32,
    span: tuple[int, int] | None = None,
) -> Drawn:
    """scale x u(seed) for the tensor called `name`, `span` being the range of elements that will be read (None: all).

    Each element is u's float32 value times `scale`, rounded once to `dtype`. Holds 2 bytes an element for gaussian and
    sphere, 1 bit for rademacher, one row and one column for low-rank.
    """
    if distribution == "low-rank" and len(shape) > 1:
        return _Outer(*low_rank_factors(seed, name, shape), scale, dtype)
    elements = math.prod(shape)
    table = scale_table(distribution, sphere_scale(seed, name, elements, distribution), scale, dtype)
    return _Entries(seed, name, *(span or (0, elements)), distribution, table)


@lru_cache(maxsize=32)  # a step's directions, for all tensors and tiles; 256 KiB each
def scale_table(distribution: Distribution, norm: float, scale: float, dtype: type) -> np.ndarray:
    """The values of a distribution's random bits, times `scale`: [65536] by 16 bits, or for signs [256, 8] by a byte.

    `norm` is sphere's, 1 for the other distributions: u is rounded to float32 before it meets `scale`.
    """
    if distribution in ("gaussian", "sphere"):
        table = (gaussian_table() * np.float32(norm)).astype(dtype) * dtype(scale)
    else:
        signs = (np.arange(256)[:, None] >> np.arange(8)) & 1
        table = (signs * 2 - 1).astype(dtype) * dtype(scale)
    table.flags.writeable = False
    return table


def forget_tables() -> None:
    """Let go of `scale_table`'s values, 256 KiB for each direction of an update: the next one has other scales."""
    scale_table.cache_clear()


class _Entries:
    """Distributions with a number per element, read out of a table by the element's bits."""

    def __init__(
        self, seed: int, name: str, start: int, stop: int, distribution: Distribution, table: np.ndarray
    ) -> None:
        self._table = table
        per_word = 64 // _BITS_PER_ELEMENT[distribution]
        first_block = start // (per_word * _WORDS_PER_BLOCK)
        self._first = first_block * per_word * _WORDS_PER_BLOCK
        word_count = -(-(stop - self._first) // per_word)
        bits = np.random.Philox(key=_key(seed, name), counter=first_block).random_raw(word_count)
        self._codes = bits.astype("<u8", copy=False).view("<u2" if table.ndim == 1 else np.uint8)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        # mode="clip": no code is out of range, and take then writes into `out` without a buffer of its own
        first, last = start - self._first, stop - self._first
        if self._table.ndim == 1:
            self._table.take(self._codes[first:last], out=out, mode="clip")
        elif first % 8 == 0 and len(out) % 8 == 0:
            self._table.take(self._codes[first // 8 : last // 8], axis=0, out=out.reshape(-1, 8), mode="clip")
        else:
            signs = self._table.take(self._codes[first // 8 : -(-last // 8)], axis=0, mode="clip")
            out[:] = signs.reshape(-1)[first % 8 :][: len(out)]


class _Outer:
    """u = a b^T. Its products are exact: no rounding but that of the scale."""

    def __init__(self, a: np.ndarray, b: np.ndarray, scale: float, dtype: type) -> None:
        self._a = a.astype(dtype) * dtype(scale)
        self._b = b.astype(dtype)

    def fill(self, start: int, stop: int, out: np.ndarray) -> None:
        width = len(self._b)
        first, last = start // width, -(-stop // width)
        if len(out) == (last - first) * width:
            np.multiply.outer(self._a[first:last], self._b, out=out.reshape(-1, width))
        else:
            rows = np.multiply.outer(self._a[first:last], self._b).reshape(-1)
            out[:] = rows[start - first * width :][: len(out)]


def low_rank_factors(
    seed: int, name: str, shape: Sequence[int]
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " columns"]]:
    """a and b of u(seed) = a b^T for a tensor of two or more dimensions, the later ones taken together; +-1, float32.

    Source: methods.md (f). Rank one, so that E[u u^T] = I needs no factor; more rank aligns no better (4.1).
    """
    rows, columns = shape[0], math.prod(shape[1:])
    return (
        tile(seed, f"{name}/rows", 0, rows, "rademacher"),
        tile(seed, f"{name}/columns", 0, columns, "rademacher"),
    )


def sphere_scale(seed: int, name: str, elements: int, distribution: Distribution) -> float:
    """The factor that gives a tensor's gaussian u the norm sqrt(elements); 1 for the other distributions."""
    return _sphere_scale(seed, name, elements) if distribution == "sphere" else 1.0


def direction(
    seed: int, name: str, shape: Sequence[int], distribution: Distribution
) -> Float[np.ndarray, "..."]:
    """u(seed) for one whole tensor; float32. Allocates the tensor's size."""
    u = np.empty(math.prod(shape), dtype=np.float32)
    drawn(seed, name, shape, distribution).fill(0, len(u), u)
    return u.reshape(shape)


def direction_rows(
    seed: int, name: str, shape: Sequence[int], rows: Sequence[int], distribution: Distribution
) -> Float[np.ndarray, "rows width"]:
    """The given rows of u(seed) for a matrix of `shape`, without drawing the others; float32."""
    _, width = shape
    u = np.empty((len(rows), width), dtype=np.float32)
    for i, row in enumerate(rows):
        span = (row * width, (row + 1) * width)
        drawn(seed, name, shape, distribution, span=span).fill(*span, u[i])
    return u


def direction_sum(
    name: str,
    shape: Sequence[int],
    seeds: Sequence[int],
    scales: Sequence[float],
    distribution: Distribution,
    dtype: type,
) -> Iterator[tuple[int, int, Float[np.ndarray, " elements"]]]:
    """(start, stop, sum_q scale_q u(seed_q)) for each tile of a tensor; the subtrahend of Alg. 1, line 8.

    Summed in the order of `seeds`, in `dtype` (float32, or float64 for float64 weights), by separate multiplications
    and additions, so that every machine rounds alike. A sum is valid until the next one is taken from the iterator.
    """
    elements = math.prod(shape)
    total, term = np.empty((2, min(elements, TILE_ELEMENTS)), dtype=dtype)
    for start, stop in tiles(elements):
        tile_sum, summand = total[: stop - start], term[: stop - start]
        tile_sum.fill(0)
        for seed, scale in zip(seeds, scales, strict=True):
            drawn(seed, name, shape, distribution, scale, dtype, (start, stop)).fill(start, stop, summand)
            tile_sum += summand
        yield start, stop, tile_sum


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
