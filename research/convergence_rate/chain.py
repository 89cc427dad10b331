"""A problem whose every constant is known: a chain of angles in a field, cut in two, as parties in numpy.

f(theta) = sum_i (1 - cos(theta_i - a_i)) + k sum_i (1 - cos(theta_{i+1} - theta_i)): smooth (second derivatives within
1 + 4 k), bounded below by 0, with maxima and saddles. Row r adds <x_r, theta>, the x_r summing to zero: a mini-batch's
gradient is that of f plus noise of a variance that is chosen and never vanishes. The client holds the first d_c angles
and sends two numbers per row, its energy and its last angle; the server adds the rest. The algorithm is not here:
`hosl.core.rounds` drives these parties as any others.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hosl.core.directions import Distribution, direction
from hosl.core.estimators import Projection, mean_scales
from hosl.core.targets import Batch, ClassTargets, Pair, StepReply, Targets
from research.convergence_rate.config import ChainProblem


class ChainClient:
    """ZerothOrderClientSide: the first angles, and the rows."""

    def __init__(
        self,
        theta: np.ndarray,
        field: np.ndarray,
        rows: np.ndarray,
        coupling: float,
        distribution: Distribution = "gaussian",
    ) -> None:
        """Take over `theta` [d_c] with its `field` a [d_c] and its part of the `rows` x [rows, d_c]; float64."""
        self.theta = theta
        self._field, self._rows, self._coupling = field, rows, coupling
        self._distribution: Distribution = distribution

    def forward(self, batch: Batch) -> np.ndarray:
        """h [rows, 1, 2]: the energy of these angles for each row, and the last angle."""
        return self._at(self.theta, batch)

    def probes(self, batch: Batch, seeds: Sequence[int], epsilon: float) -> Iterator[Pair]:
        """For each seed h at theta_c +- epsilon u(seed); theta_c is only read."""
        for seed in seeds:
            shift = epsilon * self._direction(seed)
            yield self._at(self.theta + shift, batch), self._at(self.theta - shift, batch)

    def projections(
        self, batch: Batch, seeds: Sequence[int], epsilon: float, gradient: np.ndarray
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - h-> / (2 epsilon), row by row."""
        for plus, minus in self.probes(batch, seeds, epsilon):
            yield Projection(((plus - minus) * gradient).sum((1, 2)) / (2 * epsilon), noise=0.0)

    def one_sided_projections(
        self, batch: Batch, clean: np.ndarray, seeds: Sequence[int], epsilon: float, gradient: np.ndarray
    ) -> Iterator[Projection]:
        """For each seed <gradient, h+ - clean> / epsilon, row by row."""
        for plus, _ in self.probes(batch, seeds, epsilon):
            yield Projection(((plus - clean) * gradient).sum((1, 2)) / epsilon, noise=0.0)

    def tangents(self, batch: Batch, seeds: Sequence[int], gradient: np.ndarray) -> Iterator[Projection]:
        """For each seed <gradient, J u>, row by row."""
        slope = gradient_of(self.theta, self._field, self._coupling) + self._rows[batch.input_ids[:, 0]]
        for seed in seeds:
            u = self._direction(seed)
            yield Projection(slope @ u * gradient[:, 0, 0] + u[-1] * gradient[:, 0, 1], noise=0.0)

    def descend(
        self, step: int, seeds: Sequence[int], coefficients: Sequence[float], learning_rate: float
    ) -> None:
        """theta_c -= eta_c / Q sum_q c_q u(seed_q). Source: algorithm 1, line 8. No journal."""
        for seed, scale in zip(seeds, mean_scales(coefficients, learning_rate), strict=True):
            self.theta -= scale * self._direction(seed)

    def _direction(self, seed: int) -> np.ndarray:
        return direction(seed, "theta_c", self.theta.shape, self._distribution).astype(np.float64)

    def _at(self, theta: np.ndarray, batch: Batch) -> np.ndarray:
        h = np.empty((len(batch.input_ids), 1, 2))
        energy = energy_of(theta, self._field, self._coupling)
        h[:, 0, 0] = energy + self._rows[batch.input_ids[:, 0]] @ theta
        h[:, 0, 1] = theta[-1]
        return h


class ChainServer:
    """FirstOrderServerSide: the last angles, trained by plain SGD on the exact gradient of the mini-batch."""

    def __init__(
        self, theta: np.ndarray, field: np.ndarray, rows: np.ndarray, coupling: float, learning_rate: float
    ) -> None:
        """Take over `theta` [d_s] with its `field` a [d_s] and its part of the `rows` x [rows, d_s]; float64."""
        self.theta = theta
        self._field, self._rows, self._coupling, self._eta = field, rows, coupling, learning_rate
        self._answered: tuple[int, StepReply] | None = None

    def losses(self, activations: Sequence[np.ndarray], targets: Targets) -> list[float]:
        """The mean energy of each activation's rows; theta_s unchanged."""
        return [float(self._row_losses(h, targets).mean()) for h in activations]

    def scores(self, activations: np.ndarray, targets: Targets) -> np.ndarray:
        """Minus each row's energy [rows, 1]."""
        return -self._row_losses(activations, targets)[:, None]

    def step(
        self, activations: np.ndarray, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """theta_s -= eta_s g_s; loss and dL/dh are those before it. A repeated step changes nothing."""
        if self._answered is not None and self._answered[0] == step:
            return self._answered[1]
        last = float(activations[0, 0, 1])
        dh = None
        if want_gradient:
            at_cut = -self._coupling * np.sin(self.theta[0] - last)
            dh = np.broadcast_to([1.0, at_cut], activations.shape) / len(activations)
        reply = StepReply(float(self._row_losses(activations, targets).mean()), dh)
        gradient = gradient_of(self.theta, self._field, self._coupling) + self._rows[_rows(targets)].mean(0)
        gradient[0] += self._coupling * np.sin(self.theta[0] - last)
        self.theta -= self._eta * gradient
        self._answered = (step, reply)
        return reply

    def _row_losses(self, h: np.ndarray, targets: Targets) -> np.ndarray:
        at_cut = self._coupling * (1 - np.cos(self.theta[0] - h[:, 0, 1]))
        energy = energy_of(self.theta, self._field, self._coupling)
        return h[:, 0, 0] + at_cut + energy + self._rows[_rows(targets)] @ self.theta


def energy_of(theta: np.ndarray, field: np.ndarray, coupling: float) -> float:
    """f of a stretch of the chain, without rows."""
    neighbours = theta[1:] - theta[:-1]
    return float((1 - np.cos(theta - field)).sum() + coupling * (1 - np.cos(neighbours)).sum())


def gradient_of(theta: np.ndarray, field: np.ndarray, coupling: float) -> np.ndarray:
    """df/dtheta of a stretch of the chain, without rows."""
    gradient = np.sin(theta - field)
    pull = coupling * np.sin(theta[1:] - theta[:-1])
    gradient[1:] += pull
    gradient[:-1] -= pull
    return gradient


class CutChain:
    """The chain at one cut and seed, as `study` measures it."""

    def __init__(
        self,
        problem: ChainProblem,
        cut: int,
        seed: int,
        learning_rate: Callable[[int], float],
        distribution: Distribution,
    ) -> None:
        """The field and the rows are the same for every cut and seed; the start is drawn by the seed."""
        self.client_size = cut
        self._problem, self._seed = problem, seed
        self._field = stream(0, 0).uniform(-np.pi, np.pi, problem.size)
        rows = row_noise(problem)
        theta = self._field + stream(1, seed).uniform(-np.pi, np.pi, problem.size)
        first, last = slice(0, cut), slice(cut, None)
        self.client = ChainClient(
            theta[first].copy(), self._field[first], rows[:, first], problem.coupling, distribution
        )
        self.server = ChainServer(
            theta[last].copy(), self._field[last], rows[:, last], problem.coupling, learning_rate(cut)
        )

    def batch(self, step: int) -> Batch:
        """The mini-batch of a step: the same for every cell of a seed."""
        drawn = stream(2 + self._seed, step).integers(0, self._problem.rows, self._problem.batch_rows)
        return Batch(drawn[:, None], ClassTargets(np.ones((len(drawn), 1), np.int8), drawn))

    def squares(self) -> tuple[float, float]:
        """|df/dtheta_c|^2 and |df/dtheta_s|^2 of the full objective."""
        gradient = gradient_of(self._theta(), self._field, self._problem.coupling)
        client, server = gradient[: self.client_size], gradient[self.client_size :]
        return float(client @ client), float(server @ server)

    def loss(self) -> float:
        """The full objective."""
        return energy_of(self._theta(), self._field, self._problem.coupling)

    def _theta(self) -> np.ndarray:
        return np.concatenate([self.client.theta, self.server.theta])


def row_noise(problem: ChainProblem) -> np.ndarray:
    """x [rows, d]: mean zero over rows, mean square norm noise^2, held by the noisy coordinates alone."""
    noisy = problem.noisy_coordinates or problem.size
    x = stream(0, 1).standard_normal((problem.rows, noisy))
    x -= x.mean(0)
    x *= problem.noise / np.sqrt((x * x).sum(1).mean())
    return np.pad(x, ((0, 0), (0, problem.size - noisy)))


def _rows(targets: Targets) -> Any:
    assert isinstance(targets, ClassTargets), "a chain's targets are the numbers of its rows"
    return targets.labels


def stream(kind: int, number: int) -> np.random.Generator:
    """A generator of its own for what a problem draws: data (kind 0), starts (1), mini-batches of seed s (2 + s)."""
    return np.random.Generator(np.random.Philox(key=np.array([kind, number], np.uint64)))
