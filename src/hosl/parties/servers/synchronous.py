"""A first-order server that several clients train together, one update per round."""

import torch

from hosl.core.targets import StepReply, Targets
from hosl.errors import NonFiniteError
from hosl.parties.engine.optimisers import check_gradients, optimiser_step
from hosl.parties.servers.basic import FirstOrderServer


class SynchronousServer(FirstOrderServer):
    """A first-order server that several clients train together: one update from all gradients of a round."""

    _examples: int = 0
    """The number of examples contributed since the last update."""

    def contribute(
        self, activations: torch.Tensor, targets: Targets, examples: int, *, want_gradient: bool = False
    ) -> StepReply:
        """Add the gradient of this batch, weighted by its number of `examples`, to the round's; theta_s is unchanged.

        Raises:
            NonFiniteError: if the loss or a gradient is NaN or infinite; nothing was added then.
        """
        h = activations.detach().to(self.device).requires_grad_(want_gradient)
        loss = self._loss(h, targets)
        if not torch.isfinite(loss.detach()):
            raise NonFiniteError(
                f"a client's training loss is {float(loss.detach())}; it must be finite: lower the learning rates"
            )
        trained = list(self.trained.values())
        inputs = [*trained, h] if want_gradient else trained
        gradients = torch.autograd.grad(loss * examples, inputs, allow_unused=True)
        check_gradients(gradients)
        for p, gradient in zip(trained, gradients, strict=False):
            if gradient is not None:
                p.grad = gradient.clone() if p.grad is None else p.grad.add_(gradient)
        self._examples += examples
        return StepReply(float(loss.detach()), gradients[-1] / examples if want_gradient else None)

    def apply(self, step: int) -> None:
        """One update from the mean over all examples contributed since the last one; without any, nothing changes."""
        if not self._examples:
            return
        for p in self.trained.values():
            if p.grad is not None:
                p.grad /= self._examples
        optimiser_step(self.optimiser, self.learning_rate(step))
        self._examples = 0
