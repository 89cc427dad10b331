"""A first-order server that several clients train together, one update per round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hosl.core.targets import StepReply, Targets
from hosl.errors import NonFiniteError
from hosl.parties.engine.merging import Part
from hosl.parties.engine.optimisers import check_gradients, optimiser_step
from hosl.parties.servers.basic import FirstOrderServer


@dataclass(frozen=True, slots=True, eq=False)
class Contributed:
    """One client's batch of a round."""

    activations: torch.Tensor
    targets: Targets
    weight: int
    """How much it weighs among the others: its rows or scored tokens."""
    want_gradient: bool


class RoundGradient:
    """The gradients of several clients' batches, added up in `p.grad`, each weighed by its rows or scored tokens."""

    def __init__(self, trained: Mapping[str, torch.nn.Parameter]) -> None:
        self._trained, self._weight = list(trained.values()), 0

    def add(
        self, output: torch.Tensor, h: torch.Tensor | None, weight: int, gradient: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Add the gradient of a batch, `weight` times; no weight of the model changes.

        Args:
            output: the batch's mean loss, or states whose gradient is `gradient`.
            h: a leaf of its graph; None: no gradient is returned.
            weight: how much the batch weighs among the others of the round.
            gradient: the gradient at `output`; None: it is a loss.

        Returns:
            The gradient at `h`, of this batch alone.

        Raises:
            NonFiniteError: if a gradient is NaN or infinite; nothing was added then.
        """
        weighed = output * weight if gradient is None else output
        at = None if gradient is None else gradient * weight
        found = self._add(weighed, [] if h is None else [h], weight, at)
        return found[0] / weight if found else None

    def add_losses(
        self, losses: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor | None], weights: Sequence[int]
    ) -> list[torch.Tensor | None]:
        """`add` of several batches' mean losses in one backward pass: of their sum, each times its weight.

        Each loss depends on its own leaf alone, so the gradient there is that of its own batch.

        Raises:
            NonFiniteError: if a gradient is NaN or infinite; nothing was added then, of no batch.
        """
        weighed = torch.stack([loss * weight for loss, weight in zip(losses, weights, strict=True)]).sum()
        found = iter(self._add(weighed, [h for h in leaves if h is not None], sum(weights)))
        return [
            None if h is None else next(found) / weight for h, weight in zip(leaves, weights, strict=True)
        ]

    def _add(
        self,
        output: torch.Tensor,
        leaves: Sequence[torch.Tensor],
        weight: int,
        at: torch.Tensor | None = None,
    ) -> Sequence[torch.Tensor]:
        """Add the gradient of `output`, which is weighed; returns that at `leaves`."""
        of_trained, of_leaves = self._gradients(output, leaves, at)
        for p, found in zip(self._trained, of_trained, strict=False):
            if found is not None:
                p.grad = found if p.grad is None else p.grad.add_(found)
        self._weight += weight
        return of_leaves

    def _gradients(
        self, output: torch.Tensor, leaves: Sequence[torch.Tensor], at: torch.Tensor | None
    ) -> tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor]]:
        """The gradients at the trained weights, each a tensor of its own to keep, and at `leaves`; both checked."""
        inputs = [*self._trained, *leaves]
        gradients: Any = torch.autograd.grad(output, inputs, at, allow_unused=True) if inputs else ()
        check_gradients(gradients)
        of_trained = gradients[: len(self._trained)]
        kept = [
            found.clone() if found is not None and p.grad is None else found
            for p, found in zip(self._trained, of_trained, strict=False)
        ]
        return kept, gradients[len(self._trained) :]

    def close(self) -> bool:
        """Divide by the weights added since the last time; returns whether there were any."""
        weight, self._weight = self._weight, 0
        for p in self._trained if weight else ():
            if p.grad is not None:
                p.grad /= weight
        return weight > 0


class SynchronousServer(FirstOrderServer):
    """A first-order server that several clients train together: one update from all gradients of a round."""

    def __init__(self, half: Any, **how: Any) -> None:
        """Take the arguments of `FirstOrderServer`."""
        super().__init__(half, **how)
        self._round = RoundGradient(self.trained)

    def contribute(
        self, activations: torch.Tensor, targets: Targets, examples: int, *, want_gradient: bool = False
    ) -> StepReply:
        """Add the gradient of this batch, weighted by its number of `examples`, to the round's; theta_s is unchanged.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; nothing was added then.
        """
        h = activations.detach().to(self.device).requires_grad_(want_gradient)
        loss = self._loss(h, targets)
        _check_finite(loss)
        found = self._round.add(loss, h if want_gradient else None, examples)
        return StepReply(float(loss.detach()), found)

    def contribute_together(self, parts: Sequence[Contributed]) -> list[StepReply]:
        """`contribute` of several clients' batches, in one forward and one backward pass; equal but for rounding.

        Raises:
            NonFiniteError: if a loss or a gradient is NaN or infinite; nothing was added then, of no batch.
        """
        leaves = [
            part.activations.detach().to(self.device).requires_grad_(part.want_gradient) for part in parts
        ]
        losses = self._merged_losses([Part(h, part.targets) for h, part in zip(leaves, parts, strict=True)])
        for loss in losses:
            _check_finite(loss)
        wanted = [h if part.want_gradient else None for h, part in zip(leaves, parts, strict=True)]
        found = self._round.add_losses(losses, wanted, [part.weight for part in parts])
        return [StepReply(float(loss.detach()), g) for loss, g in zip(losses, found, strict=True)]

    def apply(self, step: int) -> None:
        """One update from the mean over all examples contributed since the last one; without any, nothing changes."""
        if self._round.close():
            optimiser_step(self.optimiser, self.learning_rate(step))


def _check_finite(loss: torch.Tensor) -> None:
    if not torch.isfinite(loss.detach()):
        raise NonFiniteError(
            f"a client's training loss is {float(loss.detach())}; it must be finite: lower the learning rates"
        )
