"""Exact directional derivatives of a half by forward-mode differentiation: h and J u in one pass, no graph.

Each module that owns a trained tensor uses it as a dual number, W with tangent u, during its own call: u is drawn there
and released, so no direction is ever held for the whole half. Source: methods.md (e). Torch's fused attention and its
grouped product of experts have no forward-mode rule, so the plain ones run.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosl.core.directions import Distribution, direction
from hosl.errors import ConfigError
from hosl.parties.engine.perturbation import replaced_forwards
from hosl.system.readable import one_line


@contextmanager
def along(
    model: nn.Module, seed: int, distribution: Distribution
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Context manager: outputs of `model` carry their derivative along u(seed); the function given reads it.

    Requires: that it is read before the context ends.

    Raises:
        ConfigError: if the model has a step without a forward-mode rule.
    """

    def dual(module: nn.Module, names: Mapping[str, str]) -> Callable[..., Any]:
        return _dual_forward(module, names, seed, distribution)

    config: Any = model.config
    experts = config._experts_implementation
    try:
        config._experts_implementation = None if experts is None else "eager"
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), replaced_forwards(model, dual):
            yield _tangent_of
    except NotImplementedError as cause:
        raise ConfigError(
            f"zo.derivative: forward-mode: a step of this {config.model_type} has no such rule "
            f"({one_line(cause)}); leave it at difference"
        ) from cause
    finally:
        config._experts_implementation = experts


def _dual_forward(
    module: nn.Module, names: Mapping[str, str], seed: int, distribution: Distribution
) -> Callable[..., Any]:
    own_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        weights = {key: p for key in names if (p := module._parameters[key]) is not None}
        try:
            for key, p in weights.items():
                u = torch.from_numpy(direction(seed, names[key], tuple(p.shape), distribution)).to(p)
                module._parameters[key] = forward_ad.make_dual(p.detach(), u)  # pyright: ignore[reportArgumentType]
            return own_forward(*args, **kwargs)
        finally:
            module._parameters.update(weights)

    return forward


def _tangent_of(h: torch.Tensor) -> torch.Tensor:
    tangent = forward_ad.unpack_dual(h).tangent
    return torch.zeros_like(h) if tangent is None else tangent
