"""A client trained by probes on PyTorch: forward passes only, its state a journal."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from hosl.core.directions import Distribution
from hosl.core.estimators import Projection
from hosl.core.journal import Journal
from hosl.core.targets import Batch, Pair
from hosl.parties.clients.frozen import FrozenClient, in_one
from hosl.parties.engine.forward_mode import along
from hosl.parties.engine.perturbation import (
    BOTH_SIDES,
    PLUS_SIDE,
    Probe,
    Scratch,
    Signs,
    descend_,
    stacked,
    trained_parameters,
)
from hosl.parties.journaled import Journaled
from hosl.split import ClientHalf

STACKED_TOKENS_AT_ONCE = 1024
"""The tokens in a pass over the weights that low-rank probes share: the fastest (docs/results/benchmarks.md)."""


class ZerothOrderClient(Journaled, FrozenClient):
    """A client trained by probes: forward passes only, weights read-only but for `descend`; keeps a journal."""

    def __init__(
        self,
        half: ClientHalf,
        *,
        distribution: Distribution = "gaussian",
        micro_batch_size: int | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(half, micro_batch_size=micro_batch_size, device=device)
        self.distribution: Distribution = distribution
        self.trained = trained_parameters(half.model)
        self.journal = Journal()
        self.new_scratch: Callable[[], Scratch] = Scratch

    def probe(self, batch: Batch, seed: int, epsilon: float) -> Pair:
        """The pair of one seed; see `probes`."""
        (pair,) = self.probes(batch, [seed], epsilon)
        return pair

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """f_c at theta_c + epsilon u(seed) and at theta_c - epsilon u(seed), [rows, seq, width] each, for each seed."""
        for probes in self._groups(batch, seeds, epsilon, BOTH_SIDES):
            pairs = list(in_one(self._signed(batch, probes, BOTH_SIDES), len(batch.input_ids)))
            while pairs:  # a pair that was handed out is not held here while the next is computed
                yield _pair(pairs.pop(0))

    def projections(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, gradient: torch.Tensor
    ) -> Iterator[Projection]:
        """<gradient, h+ - h-> / (2 epsilon) for each seed, row by row. No pair is ever held for all rows.

        The difference first, then the sum in float64: no cancellation. Source: methods.md (a). The noise is
        r sqrt(|g h+|^2 + |g h-|^2) / (2 epsilon), with elementwise products and r half a unit in the last place of the
        activations' dtype: each element is taken to be off by r h, independently of the others. Rounding inside the
        half comes on top, so this is a floor.
        """
        for probes in self._groups(batch, seeds, epsilon, BOTH_SIDES):
            yield from self._projected(batch, probes, BOTH_SIDES, gradient, None)

    def one_sided_projections(
        self, batch: Batch, clean: torch.Tensor, seeds: Sequence[int], epsilon: float, gradient: torch.Tensor
    ) -> Iterator[Projection]:
        """<gradient, h+ - clean> / epsilon for each seed, row by row. Source: methods.md (a)."""
        for probes in self._groups(batch, seeds, epsilon, PLUS_SIDE):
            yield from self._projected(batch, probes, PLUS_SIDE, gradient, clean)

    def tangents(self, batch: Batch, seeds: Sequence[int], gradient: torch.Tensor) -> Iterator[Projection]:
        """<gradient, J u> for each seed, row by row, by forward-mode differentiation. Source: methods.md (e)."""
        ids, mask = self._inputs(batch)
        for seed in seeds:
            slopes = np.empty(len(ids))
            for rows in self._slices(ids, evaluations=2):
                with torch.no_grad(), along(self.half.model, seed, self.distribution) as tangent_of:
                    jvp = tangent_of(self.half(ids[rows], mask[rows]))
                slopes[rows] = _row_sums(jvp, gradient[rows])
            yield Projection(slopes, noise=0.0)

    def _groups(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, signs: Signs
    ) -> Iterator[list[Probe]]:
        """The probes that are evaluated at once: low-rank ones share a pass over the weights where that is faster."""
        together = max(STACKED_TOKENS_AT_ONCE // (len(signs) * batch.input_ids.size), 1)
        at_once = together if self.distribution == "low-rank" else 1
        probes = [Probe(seed, epsilon, self.distribution) for seed in seeds]
        yield from (probes[start : start + at_once] for start in range(0, len(probes), at_once))

    def _signed(
        self, batch: Batch, probes: Sequence[Probe], signs: Signs
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of each micro-batch, and its h [probes, signs, rows, seq, width]."""
        ids, mask = self._inputs(batch)
        times = len(probes) * len(signs)
        slices = self._slices(ids, evaluations=len(signs)) if len(probes) == 1 else [slice(0, len(ids))]
        for rows in slices:
            part_ids, part_mask = ids[rows], mask[rows]
            with (
                torch.no_grad(),
                stacked(self.half.model, probes, times * len(part_ids), signs, self.new_scratch()),
            ):
                h = self.half(part_ids.repeat(times, 1), part_mask.repeat(times, 1))
            yield rows, h.view(len(probes), len(signs), len(part_ids), *h.shape[1:])

    def _projected(
        self,
        batch: Batch,
        probes: Sequence[Probe],
        signs: Signs,
        gradient: torch.Tensor,
        clean: torch.Tensor | None,
    ) -> list[Projection]:
        """<gradient, h+ - h-> over the distance of the two sides, for each probe; `clean` takes the place of h-."""
        slopes, squares = np.empty((len(probes), len(batch.input_ids))), np.zeros(len(probes))
        rounding, span = 0.0, 2.0 if clean is None else 1.0
        for rows, h in self._signed(batch, probes, signs):
            rounding, g = torch.finfo(h.dtype).eps / 2, gradient[rows].to(h.device)
            for q, sides in enumerate(h):
                first, second = sides if clean is None else (sides[0], clean[rows])
                squares[q] += sum(float(torch.linalg.vector_norm(side * g)) ** 2 for side in (first, second))
                distance = span * probes[q].epsilon
                slopes[q, rows] = _row_sums(first - second, g) / distance
        return [
            Projection(rows, noise=rounding * math.sqrt(square) / (span * probe.epsilon))
            for rows, square, probe in zip(slopes, squares, probes, strict=True)
        ]

    def _move_(self, seeds: Sequence[int], scales: Sequence[float]) -> None:
        descend_(self.trained, seeds, scales, self.distribution)


def _pair(sides: torch.Tensor) -> Pair:
    return sides[0], sides[1]


def _row_sums(difference: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    """sum of difference * gradient for each row, [rows] in float64; products in float32 or better."""
    exact = torch.promote_types(difference.dtype, torch.float32)
    product = difference.to(exact) * gradient.to(difference.device, exact)
    return product.sum(dim=(1, 2), dtype=torch.float64).cpu().numpy()
