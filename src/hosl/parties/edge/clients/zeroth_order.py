"""A client on the engine trained by probes: forward passes only, its state a journal."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from hosl.core.array_types import Float
from hosl.core.directions import Distribution
from hosl.core.estimators import Projection
from hosl.core.journal import Journal
from hosl.core.targets import Batch, Pair
from hosl.errors import ConfigError
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.half import EdgeHalf, Extras
from hosl.parties.edge.probing import Draws, Perturbed, Probe, Scratch, perturbed_block
from hosl.parties.edge.update import descend_
from hosl.parties.journaled import Journaled

BOTH_SIDES, PLUS_SIDE = (+1, -1), (+1,)


class ZerothOrderEdgeClient(Journaled, FrozenEdgeClient):
    """A client trained by probes; the twin of `ZerothOrderClient`, whose journal gives it the same bits of weights.

    Blocks below the lowest trained one are evaluated once for all probes of a call.
    """

    def __init__(
        self,
        half: EdgeHalf,
        trained: Sequence[str],
        *,
        distribution: Distribution = "gaussian",
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__(half, trained, micro_batch_size=micro_batch_size)
        self.distribution: Distribution = distribution
        self.journal = Journal()
        in_blocks = [
            {half.parameter(i, name) for name in half.graph_facts(i).weights} & self.trained.keys()
            for i in range(half.cut)
        ]
        self._before = self.trained.keys() - set().union(*in_blocks)
        """The trained parameters before block 0."""
        with_trained = [i for i, names in enumerate(in_blocks) if names]
        self._lowest = 0 if self._before else min(with_trained, default=half.cut)

    def probe(self, batch: Batch, seed: int, epsilon: float) -> Pair:
        """The pair of one seed; see `probes`."""
        (pair,) = self.probes(batch, [seed], epsilon)
        return pair

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """f_c at theta_c + epsilon u(seed) and at theta_c - epsilon u(seed), [rows, seq, width] each, for each seed."""
        for sides in self._evaluated(batch, seeds, epsilon, BOTH_SIDES):
            h_minus, h_plus = sides.pop(), sides.pop()
            yield h_plus, h_minus
            del h_plus, h_minus  # or they would be held while the next pair is computed

    def projections(
        self,
        batch: Batch,
        seeds: Sequence[int],
        epsilon: float,
        gradient: Float[np.ndarray, "rows seq width"],
    ) -> Iterator[Projection]:
        """<gradient, h+ - h-> / (2 epsilon) for each seed, row by row; `ZerothOrderClient.projections` says more."""
        for h_plus, h_minus in self._evaluated(batch, seeds, epsilon, BOTH_SIDES):
            yield _projection(h_plus, h_minus, gradient, 2.0 * epsilon)

    def one_sided_projections(
        self,
        batch: Batch,
        clean: Float[np.ndarray, "rows seq width"],
        seeds: Sequence[int],
        epsilon: float,
        gradient: Float[np.ndarray, "rows seq width"],
    ) -> Iterator[Projection]:
        """<gradient, h+ - clean> / epsilon for each seed, row by row."""
        for (h_plus,) in self._evaluated(batch, seeds, epsilon, PLUS_SIDE):
            yield _projection(h_plus, clean, gradient, epsilon)

    def tangents(
        self, batch: Batch, seeds: Sequence[int], gradient: Float[np.ndarray, "rows seq width"]
    ) -> Iterator[Projection]:
        """Not on the engine, which has no forward-mode graphs.

        Raises:
            ConfigError: always; `make_edge_client` refuses the setting first.
        """
        raise ConfigError(
            "the onnx runtime has no zo.derivative: forward-mode; leave it out (differences), or take the torch runtime"
        )

    def _evaluated(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, signs: Sequence[int]
    ) -> Iterator[list[np.ndarray]]:
        """h [rows, seq, width] at each sign, for each seed."""
        slices, scratch = self._slices(batch), Scratch()
        below: tuple[np.ndarray, list[Extras]] | None = None
        if not self._before:
            hidden, extras = self._before_blocks(batch, slices)
            below = self._through(range(self._lowest), hidden, slices, extras), extras
        for seed in seeds:
            probe = Probe(seed, epsilon, self.distribution)
            yield self._sides(batch, probe, signs, slices, below, scratch)

    def _sides(
        self,
        batch: Batch,
        probe: Probe,
        signs: Sequence[int],
        slices: Sequence[slice],
        below: tuple[np.ndarray, list[Extras]] | None,
        scratch: Scratch,
    ) -> list[np.ndarray]:
        """h at each sign of one probe, block by block; `below` is the input of the lowest trained block."""
        draws = Draws(probe)
        if below is None:
            reads = [Perturbed(self.half, self._before, probe, sign, draws, scratch) for sign in signs]
            starts = [self._before_blocks(batch, slices, read) for read in reads]
            sides, extras = [start[0] for start in starts], starts[0][1]
        else:
            sides, extras = [below[0] for _ in signs], below[1]
        for index in range(self._lowest, self.half.cut):
            for side, sign in enumerate(signs):
                weights = perturbed_block(self.half, index, self.trained.keys(), draws, sign, scratch)
                sides[side] = self._through_block(index, sides[side], slices, extras, weights)
            draws.forget()
            self.half.release(index)
        return sides

    def _move_(self, seeds: Sequence[int], scales: Sequence[float]) -> None:
        descend_(self.trained, seeds, scales, self.distribution)


def _projection(first: np.ndarray, second: np.ndarray, gradient: np.ndarray, distance: float) -> Projection:
    """<gradient, first - second> / distance row by row, with its rounding floor."""
    g = np.asarray(gradient, np.float32)
    squares = sum(float(np.linalg.norm((side * g).reshape(-1))) ** 2 for side in (first, second))
    product = (first - second) * g
    rows = product.sum(axis=(1, 2), dtype=np.float64) / distance
    return Projection(rows, noise=float(np.finfo(np.float32).eps) / 2 * math.sqrt(squares) / distance)
