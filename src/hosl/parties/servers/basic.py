"""The servers on PyTorch, first-order and zeroth-order. They only reply to the calls of a round (hosl.core.rounds)."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.directions import Distribution
from hosl.core.estimators import mean_scales
from hosl.core.targets import Pair, StepReply, Targets
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import mean_loss, row_scores, wanted_positions
from hosl.parties.engine.merging import Part, logits_of, merged_losses
from hosl.parties.engine.optimisers import OptimiserSpec, make_optimiser, optimiser_step
from hosl.parties.engine.perturbation import Probe, descend_, stacked, trained_parameters
from hosl.split import ServerHalf

LearningRate = Callable[[int], float]
"""The learning rate of each step; steps count from 1."""


class TorchServer:
    """The calls of every server that change nothing: losses, scores, and the gradient at the cut."""

    def __init__(self, half: ServerHalf, *, learning_rate: LearningRate, device: str = "cpu") -> None:
        self.half = half
        self.device = torch.device(device)
        self.learning_rate = learning_rate
        half.to(self.device)
        half.eval()
        self.trained = trained_parameters(half.model)

    def losses(self, activations: Sequence[torch.Tensor], targets: Targets) -> list[float]:
        """The mean loss of each activation, in nats. Inference: theta_s unchanged. Source: Alg. 1, line 4."""
        with torch.no_grad():
            return [float(self._loss(h, targets)) for h in activations]

    def losses_together(
        self, questions: Sequence[tuple[Sequence[torch.Tensor], Targets]]
    ) -> list[list[float]]:
        """`losses` of several batches, in as few forward passes as they allow; equal but for rounding."""
        parts = [Part(h.to(self.device), targets) for activations, targets in questions for h in activations]
        with torch.no_grad():
            found = iter([float(loss) for loss in self._merged_losses(parts)])
        return [[next(found) for _ in activations] for activations, _ in questions]

    def scores(self, activations: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token. Inference."""
        with torch.no_grad():
            return row_scores(self._logits(activations, targets), targets)

    def gradient(self, activations: torch.Tensor, targets: Targets) -> StepReply:
        """The loss and dL/dh; no gradient of theta_s is formed and theta_s is unchanged."""
        h = activations.detach().to(self.device).requires_grad_()
        with torch.enable_grad():
            loss = self._loss(h, targets)
        (gradient,) = torch.autograd.grad(loss, h)
        return StepReply(loss=float(loss.detach()), gradient=gradient)

    def _merged_losses(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        return merged_losses(self.half, parts)

    def _logits(self, h: torch.Tensor, targets: Targets) -> torch.Tensor:
        return logits_of(self.half, Part(h.to(self.device), targets))

    def _loss(self, h: torch.Tensor, targets: Targets) -> torch.Tensor:
        return mean_loss(self._logits(h, targets), targets)


class FirstOrderServer(TorchServer):
    """A server trained by backprop, as in HOSL and in FO-FO."""

    def __init__(
        self,
        half: ServerHalf,
        *,
        learning_rate: LearningRate,
        optimiser: OptimiserSpec | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__(half, learning_rate=learning_rate, device=device)
        self.optimiser = make_optimiser(optimiser or OptimiserSpec(), self.trained.values())
        self._last_reply: tuple[int, StepReply] | None = None

    def step(
        self, activations: torch.Tensor, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s at the learning rate of `step`; loss and dL/dh are those before it.

        A repeated call for the last step returns the same reply and changes nothing. Source: Alg. 1, line 7.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; theta_s is then unchanged.
        """
        if self._last_reply is not None and self._last_reply[0] == step:
            return self._last_reply[1]
        h = activations.detach().to(self.device).requires_grad_(want_gradient)
        loss = self._finite_loss(h, targets, step)
        self._backward(loss)
        reply = StepReply(loss=float(loss.detach()), gradient=h.grad)
        optimiser_step(self.optimiser, self.learning_rate(step))
        self._last_reply = (step, reply)
        return reply

    def _backward(self, loss: torch.Tensor) -> None:
        """Leave the gradient of every trained weight in its `grad`."""
        loss.backward()

    def forget(self) -> None:
        """Let go of the last reply, which only a repeated call would need."""
        self._last_reply = None

    def _finite_loss(self, h: torch.Tensor, targets: Targets, step: int) -> torch.Tensor:
        loss = self._loss(h, targets)
        check_loss(float(loss.detach()), step)
        return loss


def check_loss(loss: float, step: int) -> None:
    """Refuse a training loss that is NaN or infinite, by NonFiniteError."""
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the training loss of step {step} is {loss}; it must be finite: lower server.learning_rate or "
            "client.learning_rate, and look for extreme values in the data"
        )


class ZerothOrderServer(TorchServer):
    """A server trained by probes, as in ZO-ZO and in FO-ZO."""

    def __init__(
        self,
        half: ServerHalf,
        *,
        learning_rate: LearningRate,
        distribution: Distribution = "gaussian",
        device: str = "cpu",
    ) -> None:
        super().__init__(half, learning_rate=learning_rate, device=device)
        self.distribution: Distribution = distribution

    def probe(self, pair: Pair, targets: Targets, seed: int, epsilon: float) -> tuple[float, float]:
        """Losses of h+ at theta_s + epsilon u(seed) and of h- at theta_s - epsilon u(seed), in nats."""
        h = torch.cat([side.to(self.device) for side in pair])
        mask = torch.from_numpy(targets.mask).to(self.device, torch.int64).repeat(2, 1)
        positions = wanted_positions(targets)
        with torch.no_grad(), stacked(self.half.model, [Probe(seed, epsilon, self.distribution)], len(h)):
            logits = self.half(h, mask, None if positions is None else positions.to(self.device))
        logits_plus, logits_minus = logits.chunk(2)
        return (
            float(mean_loss(logits_plus, targets)),
            float(mean_loss(logits_minus, targets)),
        )

    def descend(self, step: int, seeds: Sequence[int], coefficients: Sequence[float]) -> None:
        """theta_s -= eta_s / Q sum_q c_q u(seed_q), at the learning rate of `step`."""
        descend_(self.trained, seeds, mean_scales(coefficients, self.learning_rate(step)), self.distribution)
