"""ClientSide on PyTorch: frozen, zeroth-order, first-order. Each class answers only the verbs that it can keep.

Requires of the half: dropout off (L+ and L- must be one function, paper.md I4), caches off; `hosl.split` gives it so.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import numpy as np
import torch

from hosl.core.directions import Law
from hosl.core.estimators import Projection, mean_scales
from hosl.core.journal import Journal
from hosl.core.parties import Batch, Pair
from hosl.parties.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.probing import (
    BOTH_SIDES,
    PLUS_SIDE,
    Probe,
    Scratch,
    Signs,
    descend_,
    stacked,
    trained_parameters,
)
from hosl.parties.tangents import along
from hosl.split import ClientHalf

TOKENS_AT_ONCE = 4096
"""How many tokens a client evaluates at once where `micro_batch_rows` does not say otherwise."""

STACKED_TOKENS_AT_ONCE = 1024
"""How many tokens low-rank probes fill a shared pass over the weights with: the fastest size (docs/benchmarks.md)."""


class FrozenClient:
    """A client that only computes activations: the baseline that every comparison owes, and the base of the others."""

    def __init__(self, half: ClientHalf, *, micro_batch_rows: int | None = None, device: str = "cpu") -> None:
        """Take over `half`.

        Args:
            half: the client's.
            micro_batch_rows: how many rows of a batch are evaluated at once; None: as many as memory suggests
                (`row_slices`). Rows do not see each other, so this changes rounding and memory only.
            device: a torch device.
        """
        self.half = half
        self.micro_batch_rows = micro_batch_rows
        self.device = torch.device(device)
        half.to(self.device)
        half.eval()

    def forward(self, batch: Batch) -> torch.Tensor:
        """h = f_c(x; theta_c) [rows, seq, width], without a graph."""
        ids, mask = self._inputs(batch)
        return in_one(((rows, self._evaluate(ids[rows], mask[rows])) for rows in self._slices(ids)), len(ids))

    def _evaluate(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.half(ids, mask)

    def _slices(self, ids: torch.Tensor, *, evaluations: int = 1) -> list[slice]:
        return row_slices(ids.shape, evaluations, self.micro_batch_rows)

    def _inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.from_numpy(batch.input_ids).to(self.device)
        return ids, torch.from_numpy(batch.targets.mask).to(self.device, torch.int64)


def row_slices(shape: Sequence[int], evaluations: int, micro_batch_rows: int | None = None) -> list[slice]:
    """The micro-batches of a batch [rows, seq] of which each row is evaluated so many times at once.

    By default they take no more rows in all than the batch has, so that no step needs more memory than the forward
    pass of its batch, and no more than `TOKENS_AT_ONCE` tokens.
    """
    rows, seq = shape
    by_memory = min(-(-rows // evaluations), TOKENS_AT_ONCE // (seq * evaluations))
    at_once = max(micro_batch_rows or by_memory, 1)
    return [slice(start, min(start + at_once, rows)) for start in range(0, rows, at_once)]


def in_one(parts: Iterable[tuple[slice, torch.Tensor]], rows: int) -> torch.Tensor:
    """[..., rows, seq, width] from its micro-batches, the rows third from last; a single one is handed through."""
    whole = None
    for of_rows, part in parts:
        if part.shape[-3] == rows:
            return part
        if whole is None:
            whole = part.new_empty(*part.shape[:-3], rows, *part.shape[-2:])
        whole[..., of_rows, :, :] = part
    assert whole is not None, "a batch has rows"
    return whole


class ZerothOrderClient(FrozenClient):
    """A client trained by probes: forward passes only, weights read-only but for `descend`; keeps a journal."""

    def __init__(
        self,
        half: ClientHalf,
        *,
        law: Law = "gaussian",
        micro_batch_rows: int | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(half, micro_batch_rows=micro_batch_rows, device=device)
        self.law: Law = law
        self.trained = trained_parameters(half.model)
        self.journal = Journal()
        self.new_scratch: Callable[[], Scratch] = Scratch

    def probe(self, batch: Batch, seed: int, epsilon: float) -> Pair:
        """The pair of one seed; see `probes`."""
        (pair,) = self.probes(batch, [seed], epsilon)
        return pair

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """For each seed f_c at theta_c + epsilon u(seed) and theta_c - epsilon u(seed), [rows, seq, width] each."""
        for probes in self._groups(batch, seeds, epsilon, BOTH_SIDES):
            pairs = list(in_one(self._signed(batch, probes, BOTH_SIDES), len(batch.input_ids)))
            while pairs:  # what is handed out is not held here while the next is computed
                yield _pair(pairs.pop(0))

    def projections(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, gradient: torch.Tensor
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - h-> / (2 epsilon), row by row. No pair is ever held for all rows.

        The difference first, then the sum in float64: no cancellation. Source: methods.md (a). The noise is
        r sqrt(|g h+|^2 + |g h-|^2) / (2 epsilon), products by element, r half a unit in the last place of the
        activations' dtype: elements are taken to be off by r h each, independently. Rounding inside the half adds up
        to more: it is a floor.
        """
        for probes in self._groups(batch, seeds, epsilon, BOTH_SIDES):
            yield from self._projected(batch, probes, BOTH_SIDES, gradient, None)

    def one_sided_projections(
        self, batch: Batch, clean: torch.Tensor, seeds: Sequence[int], epsilon: float, gradient: torch.Tensor
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - clean> / epsilon, row by row. Source: methods.md (a)."""
        for probes in self._groups(batch, seeds, epsilon, PLUS_SIDE):
            yield from self._projected(batch, probes, PLUS_SIDE, gradient, clean)

    def tangents(self, batch: Batch, seeds: Sequence[int], gradient: torch.Tensor) -> Iterator[Projection]:
        """For each seed <gradient, J u>, row by row, by forward-mode differentiation. Source: methods.md (e)."""
        ids, mask = self._inputs(batch)
        for seed in seeds:
            slopes = np.empty(len(ids))
            for rows in self._slices(ids, evaluations=2):
                with torch.no_grad(), along(self.half.model, seed, self.law) as tangent_of:
                    jvp = tangent_of(self.half(ids[rows], mask[rows]))
                slopes[rows] = _row_sums(jvp, gradient[rows])
            yield Projection(slopes, noise=0.0)

    def _probe_along(self, batch: Batch, seed: int, epsilon: float) -> Probe:
        return Probe(seed, epsilon, self.law)

    def _groups(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, signs: Signs
    ) -> Iterator[list[Probe]]:
        """Probes that are evaluated at once: low-rank ones share a pass over the weights, as far as it pays."""
        together = max(STACKED_TOKENS_AT_ONCE // (len(signs) * batch.input_ids.size), 1)
        probes = [self._probe_along(batch, seed, epsilon) for seed in seeds]
        for law, same in groupby(probes, key=lambda probe: probe.law):
            of_law = list(same)
            at_once = together if law == "low-rank" else 1
            yield from (of_law[start : start + at_once] for start in range(0, len(of_law), at_once))

    def _signed(
        self, batch: Batch, probes: Sequence[Probe], signs: Signs
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each micro-batch its rows, and h [probes, signs, rows, seq, width]."""
        ids, mask = self._inputs(batch)
        times = len(probes) * len(signs)
        slices = self._slices(ids, evaluations=len(signs)) if len(probes) == 1 else [slice(0, len(ids))]
        for rows in slices:
            some_ids, some_mask = ids[rows], mask[rows]
            with (
                torch.no_grad(),
                stacked(self.half.model, probes, times * len(some_ids), signs, self.new_scratch()),
            ):
                h = self.half(some_ids.repeat(times, 1), some_mask.repeat(times, 1))
            yield rows, h.view(len(probes), len(signs), len(some_ids), *h.shape[1:])

    def _projected(
        self,
        batch: Batch,
        probes: Sequence[Probe],
        signs: Signs,
        gradient: torch.Tensor,
        clean: torch.Tensor | None,
    ) -> list[Projection]:
        """Of every probe <gradient, h+ - h-> over the distance between the two; `clean` takes the place of h-."""
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

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c / Q sum_q c_q u(seed_q), and the journal's entries for it. Source: paper.md l.8."""
        self.apply(step, seeds, mean_scales(coefficients, learning_rate))

    def apply(self, step: int, seeds: Sequence[int], scales: Sequence[float]) -> None:
        """theta_c -= sum_q scale_q u(seed_q), and the journal's entries for it; `descend` with the scales at hand."""
        self.journal.append(step, seeds, scales)
        descend_(self.trained, seeds, scales, self.law)

    def replay(self, journal: Journal, *, after: int = 0) -> None:
        """Apply the updates of `journal` later than step `after`; the weights must be those of that step."""
        for _, seeds, scales in journal.updates(after=after):
            descend_(self.trained, seeds, scales, self.law)
        self.journal = journal


def _pair(sides: torch.Tensor) -> Pair:
    return sides[0], sides[1]


def _row_sums(difference: torch.Tensor, gradient: torch.Tensor) -> np.ndarray:
    """sum of difference * gradient for each row, [rows] in float64; products in float32 or better."""
    exact = torch.promote_types(difference.dtype, torch.float32)
    product = difference.to(exact) * gradient.to(difference.device, exact)
    return product.sum(dim=(1, 2), dtype=torch.float64).cpu().numpy()


class FirstOrderClient(FrozenClient):
    """A client trained by ordinary backprop: the upper row of every comparison."""

    def __init__(
        self, half: ClientHalf, *, optimiser: OptimiserSpec | None = None, device: str = "cpu"
    ) -> None:
        super().__init__(half, device=device)
        self.trained = trained_parameters(half.model)
        self.optimiser = make_optimiser(optimiser or OptimiserSpec(), self.trained.values())
        self._h: torch.Tensor | None = None

    def forward_for_backward(self, batch: Batch) -> torch.Tensor:
        """h [rows, seq, width]; the graph stays here until `backward`."""
        self._h = self.half(*self._inputs(batch))
        return self._h.detach()

    def backward(self, gradient: torch.Tensor, learning_rate: float) -> None:
        """One optimiser step from dL/dh of the last `forward_for_backward`."""
        assert self._h is not None, "backward needs a forward_for_backward before it"
        h, self._h = self._h, None
        h.backward(gradient.to(h))
        optimiser_step(self.optimiser, learning_rate)
