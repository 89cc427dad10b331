"""The optimisers of a first-order half: torch's own SGD and AdamW, with a learning rate given at each step."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

import msgspec

from hosl.core.estimators import LARGEST_NUMBER
from hosl.errors import ConfigError, NonFiniteError

if TYPE_CHECKING:
    import torch  # at run time only where an optimiser is made: the schema is read by processes without torch


class OptimiserSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimiser of a first-order half. A zeroth-order half uses plain SGD on its estimate."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd: as in the paper. adamw: torch's AdamW with betas 0.9 and 0.999."""
    momentum: float = 0.0
    """SGD momentum; the paper has none, the authors' scripts 0.9."""
    weight_decay: float = 0.0
    """The weight decay: decoupled for adamw, L2 for sgd."""

    @property
    def plain(self) -> bool:
        """Whether it is SGD alone, which has no state and may move each weight by itself."""
        return self.name == "sgd" and not self.momentum and not self.weight_decay

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimiser momentum must lie in [0, 1), got {self.momentum}")
        if self.momentum and self.name == "adamw":
            raise ConfigError(
                "optimiser momentum belongs to sgd; adamw has its own betas: leave momentum at 0"
            )
        if not self.weight_decay >= 0:
            raise ConfigError(f"optimiser weight_decay must be >= 0, got {self.weight_decay}")


def make_optimiser(
    spec: OptimiserSpec, parameters: "Iterable[torch.nn.Parameter]"
) -> "torch.optim.Optimizer":
    """A torch optimiser over `parameters`; its learning rate is set at each step (`optimiser_step`)."""
    import torch

    if spec.name == "adamw":
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=spec.weight_decay)
    return torch.optim.SGD(parameters, lr=0.0, momentum=spec.momentum, weight_decay=spec.weight_decay)


def optimiser_step(optimiser: "torch.optim.Optimizer", learning_rate: float) -> None:
    """One update at `learning_rate` from the accumulated gradients, which are then released.

    Raises:
        NonFiniteError: see `check_gradients`; no weight is changed then.
    """
    try:
        check_gradients(p.grad for group in optimiser.param_groups for p in group["params"])
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        optimiser.step()
    finally:
        optimiser.zero_grad(set_to_none=True)


def check_gradients(gradients: "Iterable[torch.Tensor | None]") -> None:
    """Refuse gradients that would leave NaN or Inf in the weights, or in an optimiser's squares of them.

    Raises:
        NonFiniteError: if their norm is not below `LARGEST_NUMBER`.
    """
    import torch

    if not torch.nn.utils.get_total_norm(g.detach() for g in gradients if g is not None) < LARGEST_NUMBER:
        raise NonFiniteError(
            "a gradient is NaN, infinite, or so large that its square is, though the loss is finite; nothing was "
            "updated: look for extreme values in the data or the activations, and lower the learning rates"
        )
