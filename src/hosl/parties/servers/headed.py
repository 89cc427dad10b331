"""The head of a client that keeps its labels, on PyTorch: its loss, its scores and its own training."""

from collections.abc import Callable, Collection

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.targets import OptionTargets, Targets
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import mean_loss, mean_loss_of_scored, row_scores, row_scores_of_scored
from hosl.parties.engine.optimisers import OptimiserSpec, check_gradients, make_optimiser, optimiser_step
from hosl.parties.headed import Headed, Trunk
from hosl.split import HeadHalf


class HeadedServer(Headed):
    """A `FirstOrderServerSide` over a trunk and a `HeadHalf` on the client's device."""

    def __init__(
        self,
        trunk: Trunk,
        head: HeadHalf,
        *,
        learning_rate: Callable[[int], float],
        optimiser: OptimiserSpec | None = None,
        device: str = "cpu",
        without: Collection[int] = (),
    ) -> None:
        """Train the head's tensors except those with `id` in `without`, such as a weight tied to the client half."""
        super().__init__(trunk)
        self.head, self.device = head, torch.device(device)
        self.learning_rate = learning_rate
        head.to(self.device)
        head.eval()
        self.trained = {
            name: p for name, p in head.named_parameters() if p.requires_grad and id(p) not in without
        }
        self.optimiser = (
            make_optimiser(optimiser or OptimiserSpec(), self.trained.values()) if self.trained else None
        )

    def finite(self, activations: torch.Tensor) -> bool:
        """Whether every number is."""
        return bool(torch.isfinite(activations).all())

    def head_loss(self, states: torch.Tensor, targets: Targets) -> float:
        """The mean loss at these states, nats."""
        with torch.no_grad():
            return float(self._loss(states, targets))

    def head_scores(self, states: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """The scores at these states."""
        with torch.no_grad():
            if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
                return row_scores_of_scored(self._logits_of_scored(states), targets)
            return row_scores(self.head.logits(states.to(self.device)), targets)

    def head_gradient(self, states: torch.Tensor, targets: Targets, step: int) -> tuple[float, torch.Tensor]:
        """The loss of `step`, and its gradient at these states; the head's own gradients wait for `head_update`.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite.
        """
        leaf = states.detach().to(self.device).requires_grad_()
        loss = self._loss(leaf, targets)
        if not torch.isfinite(loss.detach()):
            raise NonFiniteError(
                f"the training loss of step {step} is {float(loss.detach())}; it must be finite: lower the "
                "learning rates"
            )
        # not of a tied weight, whose gradient is large
        gradient, *head_gradients = torch.autograd.grad(loss, [leaf, *self.trained.values()])
        check_gradients([gradient, *head_gradients])
        for p, p_gradient in zip(self.trained.values(), head_gradients, strict=True):
            p.grad = p_gradient  # replaces that of a call whose reply was lost
        return float(loss.detach()), gradient

    def head_update(self, step: int) -> None:
        """One update of the head from the newest `head_gradient`."""
        if self.optimiser is not None:
            optimiser_step(self.optimiser, self.learning_rate(step))

    def _loss(self, states: torch.Tensor, targets: Targets) -> torch.Tensor:
        if isinstance(targets, OptionTargets) and targets.mean_over == "tokens":
            return mean_loss_of_scored(self._logits_of_scored(states), targets)
        return mean_loss(self.head.logits(states.to(self.device)), targets)

    def _logits_of_scored(self, states: torch.Tensor) -> torch.Tensor:
        """The logits [1, scored, vocabulary]; a row for each, as a mask of all in one row would be their square."""
        alone = states.to(self.device)[0].unsqueeze(1)  # no transposed view: its product is made row by row
        return self.head.logits(alone).transpose(0, 1)
